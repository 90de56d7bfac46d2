"""`cliper serve`: a page to try classes and thresholds on single images."""

import os
import socket
import threading
from pathlib import Path
from typing import Annotated

import typer

from cliper.jobs.serve_guard import MOST_UPLOAD
from cliper.model.errors import ConfigError
from cliper.pipeline.config import CONFIGS, backbone_of, classes_for, embedded_note, load_config
from cliper.pipeline.corpus.decode import SUFFIXES
from cliper.pipeline.extras import require
from cliper.pipeline.label.segmenters import chosen

Opt = typer.Option

MOST_EXAMPLES = 12


def serve(
    config: Annotated[str, Opt(help="YAML file or a shipped config", metavar="FILE")] = "tiny",
    classes: Annotated[
        str | None, Opt(help="Class file or shipped list to begin with; needed for real weights", metavar="FILE")
    ] = None,
    examples: Annotated[Path | None, Opt(help="Folder of images to pick from", metavar="DIR")] = None,
    host: Annotated[
        str, Opt(help="Address to listen on; 0.0.0.0 lets other machines in", metavar="ADDRESS")
    ] = "127.0.0.1",
    port: Annotated[int, Opt(min=1, max=65535, help="Port to listen on")] = 7860,
    name: Annotated[
        list[str] | None,
        Opt(help="Host name under which browsers reach the page, e.g. through a proxy; repeat", metavar="NAME"),
    ] = None,
) -> None:
    """Open a page: upload an image, type classes, see the mask, and download the settings for `cliper label`.

    Needs the package's extra `serve`. The model is loaded once; there are no accounts and nothing leaves the
    machine. Requests of other sites' pages, and host names other than this machine's and --name, are refused.
    """
    settings, pictures = load_config(config), find_examples(examples)
    kind, checked = chosen(settings)
    names = classes_for(classes, settings)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    require("serve", "cliper serve", "gradio", "matplotlib")
    check_address(host, port)
    print(f"loading   {backbone_of(settings)}", flush=True)
    kind.pin(checked)  # raises for missing weights before torch and gradio are imported, which takes seconds
    from cliper.jobs.serve_page import THEME, build_page, css, guarded
    from cliper.pipeline.report.preview import Previewer

    page = build_page(Previewer(settings), names, pictures)
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        inbrowser=False,
        quiet=True,
        prevent_thread_lock=True,
        theme=THEME,
        css=css(),
        footer_links=[],
        ssr_mode=False,
        max_file_size=MOST_UPLOAD,
        app_kwargs=guarded([host, socket.gethostname(), socket.getfqdn(), *(name or [])]),
    )
    drawn = embedded_note(backbone_of(settings))
    if drawn is not None:
        print(f"note      {drawn}", flush=True)
    print(f"serving   http://{host}:{port} (Ctrl-C stops)", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        page.close()


def check_address(host: str, port: int) -> None:
    """Raise ConfigError if nobody can listen there; better before the model is loaded than after."""
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}, port {port}: {error.strerror}; choose another --port"
        ) from error


def find_examples(folder: Path | None) -> list[Path]:
    """The images of a folder, by default those that are shipped. Raises ConfigError if there are none."""
    place = CONFIGS / "examples" if folder is None else folder
    if not place.is_dir():
        raise ConfigError(f"--examples: {place} is not a folder")
    found = sorted(path for path in place.iterdir() if path.suffix.lower() in SUFFIXES)
    if not found:
        raise ConfigError(f"--examples: no images in {place}")
    return found[:MOST_EXAMPLES]

"""The page of `cliper serve`: Gradio's form on the left, the result of pipeline/report/preview.py on the right."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import gradio as gr
from markupsafe import escape
from starlette.middleware import Middleware

from cliper.jobs.serve_guard import OwnPageOnly, read_upload
from cliper.model.classes import ClassList
from cliper.model.config import CLIPerConfig
from cliper.model.errors import CliperError
from cliper.pipeline.config import backbone_of, embedded_note
from cliper.pipeline.corpus.decode import pixels_claimed
from cliper.pipeline.corpus.formats import FORMATS
from cliper.pipeline.errors import ImageError
from cliper.pipeline.report.preview import Choice, Previewer, parse_classes, parse_words, render_preview

# Fonts of the machine: the page loads nothing from elsewhere. Colours with the contrast that WCAG asks for.
THEME = gr.themes.Default(
    primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
).set(
    body_text_color_subdued="*neutral_500",
    block_info_text_color="*neutral_500",
    button_primary_background_fill="*primary_600",
    button_primary_background_fill_hover="*primary_700",
)
MOST_PIXELS = 25_000_000  # of an image on the page: seconds of work, so that others wait no longer
TOGETHER = 8  # requests read and rendered at the same time; the model takes them one by one
MOST_WAITING = 64
CACHE_SECONDS = 3600  # uploads are deleted after this
EMPTY = '<p class="preview-message" style="border: 0">Choose an image, name classes, and press Label.</p>'


def css() -> str:
    """The styles of the result."""
    folder = files("cliper.pipeline.report").joinpath("templates")
    return "\n".join(folder.joinpath(name).read_text(encoding="utf-8") for name in ("figure.css", "preview.css"))


def build_page(previewer: Previewer, classes: ClassList, examples: Sequence[Path]) -> gr.Blocks:
    """The page, ready to launch. `classes` are filled in at first; `examples` are image files to pick from."""
    model = previewer.config.model
    settings = model if isinstance(model, CLIPerConfig) else None  # other segmenters: classes only
    with gr.Blocks(analytics_enabled=False, title="cliper", delete_cache=(CACHE_SECONDS, CACHE_SECONDS)) as page:
        gr.Markdown("# cliper\nTry classes and thresholds on one image, then take the settings to `cliper label`.")
        drawn = embedded_note(backbone_of(previewer.config))
        if drawn is not None:
            gr.Markdown(f"**Note:** {drawn}.")
        with gr.Row():
            with gr.Column(scale=2):
                image = gr.Image(sources=["upload", "clipboard"], height=300)
                _example_buttons(examples, image)
                words = _word_inputs(settings, classes)
                *thresholds, fgc = _switches(settings)
                inputs = [image, *words, *thresholds, fgc]
                button = gr.Button("Label", variant="primary")
            with gr.Column(scale=3):
                result = gr.HTML(EMPTY)

        uploads = [Path(page.GRADIO_CACHE)]

        def run(upload: Any, *values: Any) -> str | None:
            return answer(previewer, upload, uploads, *values)

        # Without Gradio's preprocessing, which opens the image and turns it: the file itself is what counts. With
        # it, Gradio's check of the path is gone: `answer` has its own.
        button.click(run, inputs, result, preprocess=False, concurrency_limit=TOGETHER, api_name="label")

        def again(upload: Any, *values: Any) -> Any:
            return answer(previewer, upload, uploads, *values, kept=True) or gr.skip()

        # Thresholds act while they are moved, on the scores of the last press; of many moves, the last one counts.
        gr.on(
            [threshold.change for threshold in thresholds],
            again,
            inputs,
            result,
            preprocess=False,
            concurrency_limit=TOGETHER,
            trigger_mode="always_last",
            show_progress="hidden",
            api_visibility="private",
        )
    page.queue(max_size=MOST_WAITING)
    return page


def guarded(names: Sequence[str]) -> dict[str, Any]:
    """Options of the web application that let only its own page in; `names` are its hosts."""
    return {"middleware": [Middleware(OwnPageOnly, names=names)]}


def _example_buttons(examples: Sequence[Path], image: gr.Image) -> None:
    """One button per example; `gr.Examples` gives its buttons no name that a screen reader could say."""
    with gr.Row(elem_classes="examples"):
        for path in examples:
            button = gr.Button(path.name, icon=path, size="sm", min_width=80)
            button.click(lambda chosen=str(path): chosen, None, image, api_visibility="private")


def _word_inputs(settings: CLIPerConfig | None, classes: ClassList) -> list[gr.Textbox]:
    return [
        gr.Textbox(
            "; ".join(class_lines(classes)),
            label="Classes",
            info="Separated by semicolons. 'name = other words' gives a class other words",
            lines=3,
        ),
        gr.Textbox(
            "" if settings is None else "; ".join(settings.prompts.background_words),
            visible=settings is not None,
            label="Background words",
            info="Separated by semicolons. They compete with the classes and become background",
        ),
    ]


def _switches(chosen: CLIPerConfig | None) -> list[Any]:
    shown, settings = chosen is not None, chosen or CLIPerConfig()
    labels, fgc = settings.labels, settings.fgc is not None
    shares = labels.protocol == "mmseg"
    background = labels.probability_threshold if shares else labels.background_threshold
    return [
        gr.Slider(
            0, 1, labels.presence_threshold, step=0.01, label="Presence threshold", visible=shown and not shares
        ),
        gr.Slider(0, 1, background, step=0.01, label="Background threshold", visible=shown),
        gr.Checkbox(fgc, label="Fine-grained compensation (FGC)", interactive=fgc, visible=shown),
    ]


def class_lines(classes: ClassList) -> list[str]:
    """`name` or `name = prompt` for every class."""
    pairs = zip(classes.names, classes.prompts, strict=True)
    return [name if name == prompt else f"{name} = {prompt}" for name, prompt in pairs]


def answer(
    previewer: Previewer,
    upload: Any,
    uploads: Sequence[Path],
    names: str,
    words: str,
    presence: float,
    threshold: float,
    fgc: bool,
    *,
    kept: bool = False,
) -> str | None:
    """The result for one press of the button, or the message of what was wrong, as HTML.

    `kept`: from the scores of an earlier press alone; None if they are not kept. `upload` is what the page sent, a
    dictionary with a `path` in one of the folders `uploads`. Nothing of a file that is not an image goes into a
    message.
    """
    if upload is None:
        return None if kept else _message("Choose an image first.")
    path = upload.get("path") if isinstance(upload, dict) else None
    try:
        data = read_upload(path if isinstance(path, str) else "", uploads)
        if pixels_claimed(data) > MOST_PIXELS:
            raise ImageError("oversized", f"the page takes images of up to {MOST_PIXELS // 1_000_000} megapixels")
        choice = Choice(parse_classes(names), parse_words(words), presence, threshold, fgc)
        find = previewer.relabel if kept else previewer.label
        preview = find(data, Path(str(path)).name, choice)
        return None if preview is None else render_preview(preview)
    except ImageError as error:
        return _message(f"not one of {', '.join(FORMATS)}" if error.kind == "not_an_image" else str(error))
    except CliperError as error:
        return _message(str(error))


def _message(text: str) -> str:
    return f'<p class="preview-message" role="alert">{escape(text)}</p>'

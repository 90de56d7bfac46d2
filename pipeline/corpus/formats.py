"""Image formats: which are read here, under which endings, and the names of those that are not."""

import re
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

EXTRA = "pip install 'cliper[formats]'"


@dataclass(frozen=True)
class Plugin:
    """A format that needs more than Pillow's core: `module` makes Pillow read it."""

    name: str  # Pillow's
    suffixes: tuple[str, ...]
    module: str
    remedy: str  # for when the module is missing


PLUGINS = (
    Plugin("AVIF", (".avif", ".avifs"), "PIL._avif", "pip install 'pillow>=11.3'"),
    Plugin(
        "JPEG2000", (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"), "PIL.Jpeg2KImagePlugin", "pip install pillow"
    ),
    Plugin("HEIF", (".heic", ".heif", ".hif"), "pillow_heif", EXTRA),
    Plugin("JXL", (".jxl",), "pillow_jxl", EXTRA),
)
CORE = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")
CORE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng"),
    *(".webp", ".tif", ".tiff", ".bmp", ".dib", ".gif"),
)


def _registered(plugin: Plugin) -> bool:
    """Make Pillow read a format; returns whether it can."""
    if find_spec(plugin.module) is None:
        return False
    try:
        module = import_module(plugin.module)
    except (ImportError, OSError):  # OSError: a shared library of the codec is missing
        return False
    if plugin.name == "HEIF":
        module.register_heif_opener()
    return True


_HERE = tuple(plugin for plugin in PLUGINS if _registered(plugin))
FORMATS = (*CORE, *(plugin.name for plugin in _HERE))
SUFFIXES = (*CORE_SUFFIXES, *(suffix for plugin in _HERE for suffix in plugin.suffixes))

# Other files that a listing may meet, and the way to convert them.
_OTHERS = {
    **dict.fromkeys((".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"), "camera raw is not read"),
    **dict.fromkeys((".psd", ".exr", ".hdr", ".svg", ".eps", ".pdf", ".dcm", ".nii"), "this format is not read"),
    **dict.fromkeys((".ico", ".tga", ".pcx", ".ppm", ".pgm", ".pbm", ".jls", ".jxr"), "this format is not read"),
    ".parquet": "a Parquet file; --format parquet reads images in it, --format list URIs",
    ".tar": "an archive; --format tar reads it",
    **dict.fromkeys((".gz", ".tgz"), "compressed; unpack: gunzip --keep FILE, then --format tar for tars"),
    **dict.fromkeys((".bz2", ".xz", ".zst", ".7z", ".rar"), "compressed; unpack it first"),
    ".zip": "an archive; unpack: python -m zipfile -e FILE FOLDER",
    ".arrow": "an Arrow file; convert: datasets.load_from_disk(FOLDER).to_parquet(FILE)",
}


def why_left_out(ending: str, suffixes: tuple[str, ...] = SUFFIXES) -> str:
    """The reason why a listing skips files with `ending` (lower case, with its dot); `suffixes` are read."""
    plugin = next((plugin for plugin in PLUGINS if ending in plugin.suffixes), None)
    if plugin is not None and ending not in suffixes:
        return f"{plugin.name} is not read here: {plugin.remedy}"
    if not ending:
        return "no ending; --any-name reads them by content"
    return _OTHERS.get(ending, "not an image's ending")


_SIGNATURES: tuple[tuple[str, bytes], ...] = (
    ("JPEG 2000", rb"\x00\x00\x00\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51"),
    ("JPEG XL", rb"\xff\x0a|\x00\x00\x00\x0cJXL \r\n\x87\n"),
    ("AVIF", rb"....ftypavi[fs]"),
    ("HEIF", rb"....ftyp(?:hei[cxmsf]|hev[cx]|mif[12]|msf1)"),
    ("camera raw (CR3)", rb"....ftypcrx "),
    ("JPEG XR", rb"II\xbc"),
    ("TIFF", rb"II\*\x00|MM\x00\*|II\+\x00|MM\x00\+"),
    ("JPEG", rb"\xff\xd8\xff"),
    ("PNG", rb"\x89PNG\r\n\x1a\n"),
    ("GIF", rb"GIF8[79]a"),
    ("WebP", rb"RIFF....WEBP"),
    ("Photoshop", rb"8BPS"),
    ("OpenEXR", rb"v/1\x01"),
    ("Radiance HDR", rb"#\?R"),
    ("DICOM", rb"(?s:.{128})DICM"),
    ("Netpbm", rb"P[1-7][\s#]"),
    ("SVG", rb"\s*(?:<\?xml[^>]*>\s*)?<svg\b"),
    ("PDF", rb"%PDF-"),
    ("Windows icon", rb"\x00\x00\x01\x00[\x01-\x20]\x00"),
)
_PATTERNS = tuple((name, re.compile(pattern, re.DOTALL)) for name, pattern in _SIGNATURES)
_PILLOW_NAMES = {"JPEG 2000": "JPEG2000", "JPEG XL": "JXL"}  # where they differ from those above


def remedy(name: str) -> str:
    """What to do about an image of a format that `sniff` names and that cannot be opened."""
    own = _PILLOW_NAMES.get(name, name)
    missing = next((plugin for plugin in PLUGINS if plugin.name == own and plugin not in _HERE), None)
    return f"not read here: {missing.remedy}" if missing else "not read; convert to PNG or JPEG"


def sniff(data: bytes) -> str | None:
    """The name of the image format that a file begins like, or None."""
    return next((name for name, pattern in _PATTERNS if pattern.match(data[:1024])), None)


_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
_KINDS = {0xC3: "lossless", 0xC7: "lossless", 0xCB: "lossless", 0xCF: "lossless", 0xC5: "hierarchical"}


def jpeg_kind(data: bytes) -> str | None:
    """The unusual property of a JPEG, by its frame header: "12 bits per sample", "lossless"; or None."""
    place = 2
    while place + 9 < len(data) and data[place] == 0xFF:
        marker, size = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        if marker in _FRAMES:
            return _KINDS.get(marker) or (f"{data[place + 4]} bits per sample" if data[place + 4] != 8 else None)
        if size < 2:
            return None
        place += 2 + size
    return None

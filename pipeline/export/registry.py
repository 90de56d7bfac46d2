"""The formats of `cliper export`. Add one by adding to EXPORTERS."""

from cliper.pipeline.export.base import Exporter
from cliper.pipeline.export.formats.coco import COCO, PANOPTIC
from cliper.pipeline.export.formats.cvat import CVAT
from cliper.pipeline.export.formats.fiftyone import FIFTYONE
from cliper.pipeline.export.formats.huggingface import HUGGINGFACE
from cliper.pipeline.export.formats.label_studio import LABEL_STUDIO
from cliper.pipeline.export.formats.voc import VOC
from cliper.pipeline.export.formats.webdataset import WEBDATASET
from cliper.pipeline.export.formats.yolo import YOLO

EXPORTERS: dict[str, Exporter] = {
    "coco": COCO,
    "coco-panoptic": PANOPTIC,
    "voc": VOC,
    "yolo-seg": YOLO,
    "webdataset": WEBDATASET,
    "huggingface": HUGGINGFACE,
    "label-studio": LABEL_STUDIO,
    "cvat": CVAT,
    "fiftyone": FIFTYONE,
}

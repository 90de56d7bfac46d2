"""The formats of `cliper export`. Add one by adding to EXPORTERS."""

from pipeline.export.base import Exporter
from pipeline.export.coco import COCO, PANOPTIC
from pipeline.export.cvat import CVAT
from pipeline.export.fiftyone import FIFTYONE
from pipeline.export.huggingface import HUGGINGFACE
from pipeline.export.label_studio import LABEL_STUDIO
from pipeline.export.tars import WEBDATASET
from pipeline.export.voc import VOC
from pipeline.export.yolo import YOLO

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

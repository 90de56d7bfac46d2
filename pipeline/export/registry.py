"""The formats of `cliper export`. Add one by adding to EXPORTERS."""

from cliper.pipeline.export.base import Exporter
from cliper.pipeline.export.formats.coco import COCO, PANOPTIC, RESULTS
from cliper.pipeline.export.formats.cvat import CVAT
from cliper.pipeline.export.formats.datumaro import DATUMARO
from cliper.pipeline.export.formats.fiftyone import FIFTYONE
from cliper.pipeline.export.formats.folders import ADE, CITYSCAPES
from cliper.pipeline.export.formats.huggingface import HUGGINGFACE
from cliper.pipeline.export.formats.label_studio import LABEL_STUDIO
from cliper.pipeline.export.formats.labelme import LABELME
from cliper.pipeline.export.formats.sagemaker import SAGEMAKER
from cliper.pipeline.export.formats.voc import VOC
from cliper.pipeline.export.formats.webdataset import WEBDATASET
from cliper.pipeline.export.formats.yolo import YOLO, YOLO_DETECT

EXPORTERS: dict[str, Exporter] = {
    "coco": COCO,
    "coco-panoptic": PANOPTIC,
    "coco-results": RESULTS,
    "voc": VOC,
    "yolo-seg": YOLO,
    "yolo-detect": YOLO_DETECT,
    "webdataset": WEBDATASET,
    "huggingface": HUGGINGFACE,
    "label-studio": LABEL_STUDIO,
    "cvat": CVAT,
    "fiftyone": FIFTYONE,
    "labelme": LABELME,
    "datumaro": DATUMARO,
    "cityscapes": CITYSCAPES,
    "ade": ADE,
    "sagemaker": SAGEMAKER,
}

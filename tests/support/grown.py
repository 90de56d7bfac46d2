"""A pytest plugin (`-p tests.support.grown`): the label schema of a later version, with one column more."""

import pyarrow as pa

from cliper.pipeline.run import schema

NAME = "sharpness"

schema.COLUMNS = schema.COLUMNS.append(pa.field(NAME, pa.float32(), metadata={"meaning": "of the image"}))
schema.SCHEMA_VERSION += 1
schema.SINCE[NAME] = schema.SCHEMA_VERSION

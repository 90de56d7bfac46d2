"""Files by URI: local disk, S3, every other fsspec backend; retries and conditional writes."""

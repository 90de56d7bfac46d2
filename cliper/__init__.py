"""Label image corpora of any size with open-vocabulary semantic masks."""

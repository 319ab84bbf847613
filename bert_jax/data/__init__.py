"""Raw text to batches. TensorFlow is for tf.data and TFDS here, and for TF1 checkpoints in `weights.py`; kept quiet."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")  # warnings show: XLA's on resharding is one
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # tf.data computes nothing; saves a warning

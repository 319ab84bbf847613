"""Raw text to batches. The only room that imports TensorFlow (for tf.data and TFDS), and keeps it quiet."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # tf.data computes nothing; saves a warning

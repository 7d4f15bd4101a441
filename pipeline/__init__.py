"""Exact, fault-tolerant training of image classifiers: Ray Train, DALI, mixed precision, MLflow."""

__version__ = "0.2.0"

"""Exact, fault-tolerant training of image classifiers: Ray Train, DALI, mixed precision, MLflow."""

__version__ = "0.1.0"

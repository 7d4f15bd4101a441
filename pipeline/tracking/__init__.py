"""What becomes a figure, a record in MLflow, or a page.

`mlflow_logger` sends records from an outbox on disk; `ledger` counts where the time goes; `metrics` scores predictions.
"""

"""A checkpoint's model in MLflow: logged, with what it takes to load and serve it, and a version in the Model Registry.

Both are done once for a checkpoint, however often they are asked for: a record of the outbox may be sent twice.
"""

import base64
import os
import tempfile
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.models import export, pretrained
from pipeline.runs import checkpoint
from pipeline.storage import Storage

CHECKPOINT_TAG = "pipeline.checkpoint"  # of a logged model and its registered versions
TOP1_TAG = "pipeline.top1"
STORE = "MLFLOW_TRACKING_URI"
MODEL_CODE = Path(__file__).with_name("pyfunc_model.py")
MODEL_PACKAGES = ("mlflow", "numpy", "pandas", "pillow", "torch")  # what that file imports


class ModelRegistry:
    """Publishes the checkpoints of one training.

    Args:
        client: of the MLflow store at `uri`, which has the training's run.
    """

    def __init__(self, client: Any, uri: str, experiment_id: str, run_id: str):
        import mlflow

        self._client, self._experiment_id, self._run_id = client, experiment_id, run_id
        before = os.environ.get(STORE)
        mlflow.set_tracking_uri(uri)  # for the process: models:/... is looked up there, whatever the client
        os.environ.pop(STORE, None)  # which it may set besides; the process's next training would go to this store
        if before is not None:
            os.environ[STORE] = before

    def log(self, place: Storage) -> str:
        """The id of the logged model of a checkpoint, which is logged now if it was not before.

        Raises:
            CheckpointError: the checkpoint is damaged.
        """
        own = f"source_run_id = '{self._run_id}' AND tags.`{CHECKPOINT_TAG}` = '{place.name}'"
        logged = self._client.search_logged_models([self._experiment_id], filter_string=own)
        whole = [model.model_id for model in logged if model.status == "READY"]  # others were cut off
        return str(whole[0]) if whole else self._log(place)

    def register(self, model_id: str, name: str, place: Storage, tags: dict[str, str]) -> int:
        """The version of the registered model `name` that a logged model is, which it becomes now if it was not before.

        Args:
            place: the model's checkpoint.
            tags: of a new version, beside the checkpoint and its top-1.
        """
        from mlflow import MlflowException

        try:
            self._client.create_registered_model(name)
        except MlflowException as e:
            if e.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        source = f"models:/{model_id}"
        for registered in self._client.search_model_versions(f"name = '{name}' AND run_id = '{self._run_id}'"):
            if registered.source == source:
                return int(registered.version)
        top1 = checkpoint.read_meta(place)["metrics"].get("top1")
        tags = tags | {CHECKPOINT_TAG: place.name} | ({} if top1 is None else {TOP1_TAG: f"{top1:.6f}"})
        return int(self._client.create_model_version(name, source, self._run_id, tags, model_id=model_id).version)

    def _log(self, place: Storage) -> str:
        """As `pyfunc_model` with an exported graph: loading it runs no pickled code."""
        import mlflow
        from mlflow.models import Model

        model, cfg, classes = pretrained.load_model(place)
        notes = export.make_notes(cfg, classes, place.name)
        tags = {CHECKPOINT_TAG: place.name}
        # `pyfunc.log_model` would start the run again and end it; `Model.log` alone would not know the experiment.
        logged = self._client.create_logged_model(self._experiment_id, "model", self._run_id, tags)
        with tempfile.TemporaryDirectory() as folder:
            graph = Path(folder) / "graph.pt2"
            export.write_pt2(export.trace_graph(model, notes["size"]), notes, graph)
            Model.log(
                None,
                mlflow.pyfunc,
                run_id=self._run_id,
                model_id=logged.model_id,
                python_model=str(MODEL_CODE),
                artifacts={"graph": str(graph)},
                signature=_signature(),
                input_example=_example(),
                pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in MODEL_PACKAGES],
                metadata={"classes": list(classes), "checkpoint": place.name},
            )
        return str(logged.model_id)


def _signature() -> Any:
    """Of `pyfunc_model`: a text for each image; the answer has no class and no probability where there is an error."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import Array

    text, number = DataType.string, DataType.double
    answer = {"class": text, "probability": number, "classes": Array(text), "probabilities": Array(number)}
    columns = [ColSpec(kind, name, required=False) for name, kind in answer.items()]
    return ModelSignature(Schema([ColSpec(text, "image")]), Schema([*columns, ColSpec(text, "error")]))


def _example() -> Any:
    """A request with one picture: not of the data, which not everybody who sees the model may see."""
    import pandas as pd

    file = BytesIO()
    Image.linear_gradient("L").resize((64, 64)).save(file, "PNG")
    return pd.DataFrame({"image": [base64.b64encode(file.getvalue()).decode()]})

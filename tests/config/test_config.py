"""Configurations: wrong requests get one line that names key, value and fix; right ones survive a round trip."""

import json
from pathlib import Path

import pytest
from commands import ROOT

from pipeline.cli import app
from pipeline.config.fields import refuse_credentials
from pipeline.config.loading import dump, load, load_saved
from pipeline.errors import UserError

CONFIGS = ROOT / "configs"
DATA = ["data.train=a", "data.val=b"]

# Override, and what its line must say after the value.
WRONG = {
    "train.epoch=3": "no such key; did you mean train.epochs?",
    "epochs=3": "no such key; did you mean train.epochs?",
    "optimizer.lr=0.1": "no such key; did you mean optim.lr?",
    "nonsense=1": "no such key; `pipeline config --explain` lists all keys",
    "train.epochs.x=3": "no such key; did you mean train.epochs?",
    "train=3": "is a section; set one of train.epochs, ",
    "train.epochs=many": "must be a whole number",
    "train.epochs=2.5": "must be a whole number",
    "train.epochs=true": "must be a whole number",
    "train.epochs=0": "must be at least 1",
    "train.steps=-5": "must be at least 1",
    "train.log_every=null": "must be a whole number",
    "train.precision=fp8": "must be one of auto, bf16, fp16, fp32",
    "train.label_smoothing=1.5": "must be at least 0 and at most 0.9999",
    "train.ema_decay=1.0": "must be above 0 and at most 0.999999",
    "train.clip_norm=0": "must be above 0",
    "train.micro_batch=x": "must be a whole number, at least 1 (images), or null",
    "model.depth=20": "must be one of 18, 34, 50, 101, 152",
    "model.stride_on=2x2": "must be one of 3x3, 1x1",
    "model.zero_init_residual=maybe": "must be true or false",
    "optim.name=adam": "must be one of sgd, adamw, lamb, lars",
    "model.variant=c": "must be one of plain, d",
    "model.drop_path=1": "must be at least 0 and at most 0.9",
    "model.freeze=fc": "must be one of none, stem, layer1, layer2, layer3, layer4",
    "optim.lr_batch=null": "lr_scaling=linear: give optim.lr_batch",
    "optim.layer_decay=0": "must be above 0 and at most 1",
    "train.bce_threshold=0.2": "needs train.loss=bce",
    "mlflow.register=a/b": "must be a name without",
    "data.crop_short=[200,480]": "must be [low,high] with image_size=224 <= low <= high",
    "optim.lr=-1": "must be above 0",
    "optim.lr=.nan": "must be above 0",
    "optim.lr=.inf": "must be above 0",
    "optim.schedule=poly": "must be one of cosine, step, linear",
    "optim.betas=[0.9]": "must be a list of two numbers, [low,high]",
    "optim.step_epochs=[30,20]": "must be rising",
    "optim.step_epochs=[1,x]": "must be a list of numbers, [a,b,...]",
    "optim.final_lr=9": "must be at most lr=0.4",
    "optim.warmup_epochs=100": "must be at most train.epochs=90",
    "data.crop_scale=[0.5,0.2]": "must be [low,high] with low <= high",
    "data.crop_scale=[0,1]": "must be above 0 and at most 1",
    "data.crop_ratio=wide": "must be a list of two numbers, [low,high]",
    "data.image_size=300": "must be at least image_size=300",
    "data.flip=2": "must be at least 0 and at most 1",
    "data.start_size=300": "must be at most image_size=224",
    "data.grow_epochs=[9,3]": "must be [low,high] with low <= high",
    "data.val_size=300": "must be at least val_size=300",
    "data.shuffle_block=0": "must be at least 1",
    "data.auto_augment=augmix": "must be one of none, trivial, rand, auto",
    "data.rand_magnitude=31": "must be at least 0 and at most 30",
    "data.jitter=[0.4,0.4]": "must be a list of 4 numbers",
    "data.jitter=[0,0,0,1]": "the hue's, the last, must be at most 0.5",
    "data.erase=1.1": "must be at least 0 and at most 1",
    "data.erase_scale=[0.5,0.2]": "must be [low,high] with low <= high",
    "data.mixup=-1": "must be at least 0",
    "data.cache_gb=0": "must be above 0",
    "data.train=": "must be a text",
    'data.train=""': "is not set; give a folder of CLASS/image files",
    "run.name=../escape": "use letters, digits,",
    "run.name=.hidden": "use letters, digits,",
    "run.seed=-1": "must be at least 0",
    "mlflow.public_url=http://h:99999999": "must be http://HOST:PORT or https://HOST, as a browser takes it",
    "mlflow.public_url=http://:5000": "must be http://HOST:PORT or https://HOST, as a browser takes it",
    "mlflow.public_url=mlflow:5000": "must be http://HOST:PORT or https://HOST, as a browser takes it",
    "mlflow.uri=file:/tmp/x": "MLflow keeps no runs in plain files; use sqlite:///FILE.db or http://HOST:PORT",
    "mlflow.checkpoints=some": "must be one of all, best, last, none",
    "cluster.workers=0": "must be a whole number, at least 1, or [min,max] of them",
    "cluster.workers=two": "must be a whole number, at least 1, or [min,max] of them",
    "cluster.workers=true": "must be a whole number, at least 1, or [min,max] of them",
    "cluster.workers=[2,1]": "must be a whole number, at least 1, or [min,max] of them",
    "cluster.workers=[1,2,3]": "must be a whole number, at least 1, or [min,max] of them",
    "cluster.grow_after_s=-1": "must be at least 0",
    "cluster.timeout_s=1": "must be at least 10",
    "cluster.workers=3000": "raise it to 3000 or lower cluster.workers",
    "cluster.device=tpu": "must be one of auto, cpu, gpu",
    "checkpoint.keep=0": "must be at least 1",
    "just-text": "write key=value",
    "=3": "write key=value",
    "train.epochs=[1": "the value is not YAML",
    "run.name=${nothing}": "Interpolation key 'nothing' not found",
}


@pytest.mark.parametrize("override", WRONG)
def test_wrong_settings_get_one_line_and_exit_code_2(override: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = app.main(["config", str(CONFIGS / "imagenet" / "resnet152.yaml"), override])
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("pipeline: ")
    assert (override.split("=")[0].split(".")[-1] or override) in err
    assert WRONG[override] in err
    assert "Traceback" not in err


def test_a_batch_holds_whole_pairs_and_all_copies() -> None:
    for wrong, message in (
        (["data.repeated_aug=3"], r"train.global_batch=256: must be a multiple of 3, for data.repeated_aug copies"),
        (["data.mixup=0.2", "train.global_batch=33"], "must be a multiple of 2, for pairs for data.mixup"),
        (["data.cutmix=1", "train.global_batch=4", "cluster.workers=3"], "raise it to 6 or lower cluster.workers"),
    ):
        with pytest.raises(UserError, match=message):
            load(None, [*DATA, *wrong])
    load(None, [*DATA, "data.repeated_aug=4", "data.mixup=0.2", "data.cutmix=1", "cluster.workers=3"])


def test_gradients_of_cuda_graphs_are_not_added_up() -> None:
    """Their memory is written to again by the next run."""
    graphs = ["model.compile=reduce-overhead", "train.global_batch=24"]
    with pytest.raises(UserError, match=r"train\.micro_batch=8: adds gradients up, .* set model\.compile=default"):
        load(None, [*DATA, *graphs, "cluster.workers=[1,3]", "train.micro_batch=8"])
    load(None, [*DATA, *graphs, "cluster.workers=3", "train.micro_batch=8"])
    load(None, [*DATA, "train.global_batch=24", "train.micro_batch=8", "model.compile=default"])


def test_a_checkpoint_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """What was a default then is none now; who writes it today is told."""
    file = tmp_path / "config.yaml"
    file.write_text(dump(load(None, DATA)).replace("hw_decoder_load: 1.0", "hw_decoder_load: 0.65"))
    assert load_saved(file) == load(None, DATA)
    halves = load(None, [*DATA, "train.micro_batch=8", "model.compile=default"])
    graphs = tmp_path / "graphs.yaml"
    graphs.write_text(dump(halves).replace("compile: default", "compile: reduce-overhead"))
    assert load_saved(graphs) == halves
    with pytest.raises(UserError, match=r"data\.hw_decoder_load=0\.65: must be 0 or 1"):
        load(file)
    with pytest.raises(UserError, match=r"data\.hw_decoder_load=0\.5: must be 0 or 1"):
        load_saved(file, ["data.hw_decoder_load=0.5"])


def test_a_single_small_image_in_a_forward_pass_is_refused() -> None:
    small = [*DATA, "data.image_size=32", "optim.warmup_epochs=0"]
    for settings in (["train.global_batch=3", "cluster.workers=2"], ["train.global_batch=3", "train.micro_batch=2"]):
        with pytest.raises(UserError, match="too few for BatchNorm"):
            load(None, [*small, *settings])
    load(None, [*small, "train.global_batch=33", "train.micro_batch=32"])  # split into 17 and 16
    load(None, [*DATA, "train.global_batch=2", "cluster.workers=2"])


def test_workers_that_would_wait_for_each_others_batch_norm_are_refused() -> None:
    synced = [*DATA, "model.sync_bn=true", "train.global_batch=10", "train.micro_batch=2"]
    for workers in ("4", "[2,4]"):
        with pytest.raises(UserError, match="global_batch=10: 4 workers go through it in 1 or 2 forward passes"):
            load(None, [*synced, f"cluster.workers={workers}"])
    load(None, [*synced, "cluster.workers=2"])
    load(None, [*synced, "cluster.workers=4", "train.micro_batch=null"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: [1, 2]", r"train=\[1,2\]: is a section"),
        ("train:\n  epochz: 3", r"train.epochz=3: no such key; did you mean train.epochs\?"),
        ("- a\n- b", "must hold sections such as 'train:', not a list"),
        ("train: {epochs: ", "is not YAML"),
        ("\x00", "is not YAML"),
    ],
)
def test_wrong_files_are_told(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load(tmp_path / "c.yaml", DATA)


def test_a_missing_file_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no config file .*digit\.yaml; did you mean .*digits\.yaml\?"):
        load(CONFIGS / "digit.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load(CONFIGS)


def test_later_settings_win_and_the_dump_reads_back(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("train: {epochs: 3}\noptim: {step_epochs: [1, 2], lr: 1e-3}\nrun: {name: 007}")
    cfg = load(tmp_path / "c.yaml", [*DATA, "train.epochs=4", "train.epochs=5"])
    assert (cfg.train.epochs, cfg.optim.lr, cfg.optim.step_epochs, cfg.run.name) == (5, 1e-3, (1.0, 2.0), "7")
    (tmp_path / "d.yaml").write_text(dump(cfg))
    assert load(tmp_path / "d.yaml") == cfg


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_file_loads(path: Path) -> None:
    assert load(path).data.train


@pytest.mark.parametrize(
    "uri",
    [
        "s3://key:hush@bucket/runs",
        "https://hush@host/images",
        "https://host/a.tar?sp=r&sig=hush",
        "abfs://box/runs?account_key=hush",
        "abfs://box/runs?account_name=me&sas_token=hush",
        "https://host/a.tar?X-Amz-Algorithm=x&X-Amz-Signature=hush",
        "https://host/a.tar?X-Goog-Credential=hush",
        "s3://bucket/runs?region=r&secret_key=hush",
        "gs://bucket/{00..09}.tar?API-Key=hush",
        "https://host/a.tar?token=hush",
        "https://host/a.tar?session_token=hush",
        "https://host/a.tar?X-Amz-Security-Token=hush",
        "https://host/a.tar?private_token=hush",
        "https://host/a.tar?x=1&SharedAccessSignature=hush",
        "s3://bucket/runs?secretAccessKey=hush",
        "https://host/a.tar?Authorization=Bearer%20hush",
        "postgresql://db/mlflow?user=me&pwd=hush",
        "postgresql://db/mlflow?user=me&passwd=hush",
        "https://host/a.tar?key=hush",
        "https://host/a.tar?apikey=hush",
        "https://host/a.tar?access_key=hush",
        "https://host/a.tar?SAS=hush",
        "https://host/a.tar?next_api_key=hush",
        "https://host/a.tar?page_password=hush",
    ],
)
def test_a_secret_in_a_uri_is_refused_and_not_told(uri: str) -> None:
    """Settings go to MLflow's parameters, checkpoints and logs."""
    with pytest.raises(UserError, match="leave the login out of it") as refused:
        refuse_credentials("run.storage", uri)
    assert "hush" not in str(refused.value)
    with pytest.raises(UserError, match=r"model\.weights: leave the login out of it"):
        load(None, [*DATA, f"model.weights={json.dumps(uri)}"])


@pytest.mark.parametrize(
    "uri",
    [
        *("/data/a?sig=b", "/data/x@y:z@", "s3://bucket/runs?region=eu-west-1&endpoint_override=127.0.0.1:9000"),
        *("http://host:5000/x@y", "http://[::1]:5000", "hdfs://user@name/runs", "postgresql://me@db/mlflow"),
        *("s3://bucket/runs?region=", "s3://bucket/signature?scheme=http", "gs://bucket/secret=3/runs"),
        *("https://host/list?page_token=3", "https://host/list?next-token=1", "https://host/a?tokenizer=b&design=c"),
        *(
            "https://host/list?continuationToken=3",
            "https://host/list?nexttoken=3",
            "s3://bucket/runs?kms_key_id=alias",
            "https://host/a?monkey=b",
        ),
    ],
)
def test_other_uris_are_not_taken_for_secrets(uri: str) -> None:
    refuse_credentials("run.storage", uri)

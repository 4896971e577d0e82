"""What is said, or left out, before a run begins."""

from whole_run import chats, configuration  # noqa: F401

from gpt_jax.metrics import read_lines
from gpt_jax.train import train_and_evaluate

TINY = [
    *("--config.num_steps=2", "--config.model.num_layers=1", "--config.model.embed_dim=16"),
    *("--config.model.num_heads=1", "--config.model.dropout_rate=0.0", "--config.batch_size=2"),
]


def test_every_0_means_never(corpus, tmp_path):
    never = ["eval.every", "sample.every", "checkpoint.every", "log.every", "log.diagnostics_every"]
    config = configuration(corpus, *TINY, *(f"--config.{name}=0" for name in never))
    assert train_and_evaluate(config, tmp_path / "run") is None
    lines = list(read_lines(tmp_path / "run" / "metrics.jsonl"))
    assert [(line["split"], line["step"]) for line in lines] == [("train", 1), ("train", 2)]
    assert (tmp_path / "run" / "samples.jsonl").read_text() == ""
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["2"]  # the last is always saved
    assert "step      1/2" not in (tmp_path / "run" / "log.txt").read_text()
    assert "# Run" in (tmp_path / "run" / "report.md").read_text()

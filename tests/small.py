"""The demo made small: the same stages and graph in a fraction of the time."""

SETTINGS = (
    "texture.clips.train=60",
    "texture.clips.validation=36",
    "texture.clips.test=60",
    "speech.clips.train=60",
    "speech.clips.validation=36",
    "speech.clips.test=96",
    "texture.clips_per_shard=60",
    "speech.clips_per_shard=60",
    "encoder.shape.width=32",
    "encoder.shape.num_layers=1",
    "encoder.shape.num_heads=2",
    "encoder.steps=10",
    "text.num_documents=2000",
    "pretrain.max_steps=30",
    "pretrain.last_lesson_steps=10",
    "pretrain.min_accuracy=0.01",
    "pretrain.lesson_accuracy=0.01",
    "pretrain.gpt.n_embd=48",
    "pretrain.gpt.n_layer=2",
    "align.steps=10",
    "lora.steps=10",
    "benchmark.words=12",
    "benchmark.voice=8",
    "benchmark.scene=24",
    "evaluation.bootstrap_draws=500",
    "evaluation.shuffles=2",
    "embedding_map.clips=40",
)


def demo(*more: str) -> list[str]:
    """Arguments that make a verb work on the small demo."""
    return ["demo", *(word for setting in (*SETTINGS, *more) for word in ("--set", setting))]

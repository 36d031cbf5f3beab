"""The demo and base-tiny made small: the same stages and graphs in a fraction of the time."""

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
    "encoder.shape.num_layers=2",
    "encoder.shape.num_heads=2",
    "encoder.steps=10",
    "features.layers=1,last",
    "augment.share=0.5",
    "text.num_documents=2000",
    "lessons.max_steps=30",
    "lessons.last_lesson_steps=10",
    "lessons.min_accuracy=0.01",
    "lessons.lesson_accuracy=0.01",
    "lessons.settling_accuracy=0.01",
    "lessons.gpt.n_embd=48",
    "lessons.gpt.n_layer=2",
    "instructions.rows=400",
    "instructions.validation_rows=200",
    "align.steps=10",
    "align.min_gap=0",
    "lora.steps=10",
    "lora.min_gap=0",
    "strange.pairs=20",
    "strange.random_sounds=20",
    "strange.clips_per_kind=8",
    "strange.foreign=6",
    "familiarity.taught_clips=60",
    "familiarity.components=16",
    "benchmark.words=12",
    "benchmark.speaker=4",
    "benchmark.prosody=4",
    "benchmark.quality=4",
    "benchmark.room=8",
    "benchmark.events=20",
    "benchmark.conflict=8",
    "evaluation.bootstrap_draws=500",
    "evaluation.shuffles=2",
    "diagnosis.clips=40",
    "diagnosis.probe_clips=100",
    "diagnosis.transcribed_clips=20",
    "diagnosis.bootstrap_draws=500",
)


def demo(*more: str) -> list[str]:
    """Arguments that make a verb work on the small demo."""
    return ["demo", *(word for setting in (*SETTINGS, *more) for word in ("--set", setting))]


BASE_SETTINGS = (
    "text.num_documents=2000",
    "text.validation_documents=200",
    "lessons.max_steps=30",
    "lessons.last_lesson_steps=10",
    "lessons.min_accuracy=0.01",
    "lessons.lesson_accuracy=0.01",
    "lessons.settling_accuracy=0.01",
    "lessons.gpt.n_layer=2",
    "lessons.gpt.n_embd=48",
    "pretrain.gpt.n_layer=2",
    "pretrain.gpt.n_embd=48",
    "pretrain.gpt.sequence_len=128",
    "pretrain.steps=12",
    "pretrain.validate_every=6",
    "pretrain.sample_every=6",
    "pretrain.validation_tokens=1024",
    "evaluation.split_tokens=1024",
    "core.items_per_task=4",
    "sets.train_rows=200",
    "sets.test_rows=8",
    "conversations.smoltalk_rows=100",
    "conversations.mmlu_rows=100",
    "conversations.arc_rows=50",
    "conversations.gsm8k_rows=50",
    "conversations.identity_rows=20",
    "chat_evaluation.bootstrap_draws=200",
    "chat_evaluation.max_answer_tokens=8",
)


def base_tiny(*more: str) -> list[str]:
    """Arguments that make a verb work on the small base-tiny."""
    return ["base-tiny", *(word for setting in (*BASE_SETTINGS, *more) for word in ("--set", setting))]

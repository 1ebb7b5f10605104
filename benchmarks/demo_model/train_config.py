"""The configuration of a training run of the demo model."""

from dataclasses import dataclass, field

from demo_model.world import WorldConfig


@dataclass(frozen=True)
class ModelShape:
    """Dimensions of the model: grouped-query heads 3:1, as in Llama-3.2-3B."""

    vocab_size: int = 2048
    hidden_size: int = 288
    intermediate_size: int = 800
    num_hidden_layers: int = 5
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 4096


@dataclass(frozen=True)
class TrainConfig:
    """Everything that determines the result of a training run.

    Attributes:
        seed: Seed of the world, the text, the initial weights and the order of training.
        steps: Optimizer steps.
        rows_per_step: Rows in a batch.
        row_tokens: Tokens in a row of whole question and answer pairs; long enough that evaluated
            prompts have no positions outside of training.
        pairs: Question and answer pairs that are generated; training shuffles and repeats them.
        tokenizer_pairs: Number of pairs that the tokenizer is trained on.
        learning_rate: Peak of the cosine schedule.
        warmup_steps: Steps of linear warm-up.
        weight_decay: Weight decay of AdamW.
        question_loss_weight: Weight of a question token's loss; an answer token's is 1.
        world: Size and noise of the world.
        shape: Dimensions of the model.
    """

    seed: int = 0
    steps: int = 4000
    rows_per_step: int = 128
    row_tokens: int = 512
    pairs: int = 400_000
    tokenizer_pairs: int = 20_000
    learning_rate: float = 1.5e-3
    warmup_steps: int = 200
    weight_decay: float = 0.05
    question_loss_weight: float = 0.1
    world: WorldConfig = field(default_factory=WorldConfig)
    shape: ModelShape = field(default_factory=ModelShape)

"""Results of eval: what a model says of text, and how far it is from another one. Plain data."""

from typing import Annotated, Literal

from sparseprune.results.fields import AtLeastOne, Count, Doc, Document, NotNegative, Record, Seconds, Share

_PerToken = Annotated[NotNegative | None, Doc("exp of the mean loss of a predicted token, in nats")]
_PerByte = Annotated[
    NotNegative | None, Doc("exp of the loss over the bytes that predicted tokens stand for")
]
_Cosine = Annotated[float | None, Doc(minimum=-1, maximum=1)]


class StandardErrors(Record):
    """Of the means of the same names, over windows; null where a mean is, or if there is one window."""

    perplexity: NotNegative | None
    perplexity_per_byte: NotNegative | None
    dense_perplexity: NotNegative | None
    dense_perplexity_per_byte: NotNegative | None
    kl: NotNegative | None
    top1: NotNegative | None
    cosine: NotNegative | None
    cosine_first: NotNegative | None


class GuessedToken(Record):
    """The token that a model holds for the most probable one."""

    text: str
    probability: Annotated[Share | None, Doc("null if the model gives no finite number")]


class DifferingToken(Record):
    """A token of which two models say most different things."""

    kl: Annotated[NotNegative | None, Doc("nats; null if it is not finite")]
    window: Annotated[Count, Doc("the number of its sequence, from 0")]
    position: Annotated[AtLeastOne, Doc("its place there, from 0")]
    before: Annotated[str, Doc("the text right before it")]
    token: Annotated[str, Doc("its own text")]
    guess: Annotated[GuessedToken, Doc("what the evaluated model says")]
    dense_guess: Annotated[GuessedToken, Doc("what the dense model says")]


class Evaluation(Document):
    """sparseprune eval --json.

    A mean that is not asked for, not known of such a model, or not finite, is null.
    """

    schema: Literal["sparseprune.eval.v1"] = "sparseprune.eval.v1"
    input: Annotated[str, Doc("path of the checkpoint, as it was typed")]
    against: Annotated[str | None, Doc("path of the dense checkpoint, as it was typed")]
    kind: Annotated[
        Literal["decoder", "encoder-decoder", "encoder"],
        Doc("an encoder predicts no next tokens, also if it fills masks in"),
    ]
    device: str
    seconds: Seconds
    text: Annotated[tuple[str, ...], Doc("files of text", minItems=1)]
    sequences: Annotated[AtLeastOne, Doc("windows of the text, over which standard errors are taken")]
    length: Annotated[AtLeastOne, Doc("tokens of a sequence, with the special ones")]
    seed: Count
    special: Annotated[bool, Doc("whether special tokens count")]
    tokens: Annotated[Count, Doc("that are predicted and count; of encoders those that count")]
    bytes: Annotated[Count | None, Doc("of the text that the predicted tokens stand for")]
    perplexity: _PerToken
    perplexity_per_byte: _PerByte
    dense_perplexity: Annotated[_PerToken, Doc("of the dense model")]
    dense_perplexity_per_byte: Annotated[_PerByte, Doc("of the dense model")]
    kl: Annotated[NotNegative | None, Doc("KL(dense || this) of the next token, nats a token")]
    top1: Annotated[Share | None, Doc("share of the tokens of which both hold the same for most probable")]
    cosine: Annotated[
        _Cosine, Doc("mean over windows of the cosine of both models' mean-pooled last hidden states")
    ]
    cosine_first: Annotated[_Cosine, Doc("the same of the states of the first token, such as [CLS]")]
    errors: Annotated[StandardErrors, Doc("standard errors of these means")]
    worst: Annotated[tuple[DifferingToken, ...], Doc("the tokens where both models differ most, these first")]
    missing: Annotated[
        tuple[str, ...], Doc("weights of the models that the checkpoints lack, which had random values")
    ]

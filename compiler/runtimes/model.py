"""A decoder by an engine, with the calls that models of transformers have."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig
from transformers.generation import GenerateDecoderOnlyOutput

from ...dsl.syntax.diagnostics import Fault
from ...kernels.native import KernelError
from ..core.json_errors import first_line
from ..plugin.clock import Runtime
from .cache import SequenceCache
from .decoder import Decoder
from .generation import Generation, invalid_sampling, parse_generation_config
from .inputs import check_mask, check_token_id_tensor, checked_sampling_options, next_token_loss
from .position_offsets import refuse_visible_padding
from .process_lock import ProcessLock
from .sequence_pool import AcquiredSlot, SequencePool
from .speculation import CallCosts

context_full = Fault(
    "context-full",
    "A sequence has more tokens than the model has positions.\n\n"
    "The engine computes up to the longest context that the model's config states.",
    exit="usage",
)
unknown_token = Fault("unknown-token", "A token id is given that a model does not have.", exit="usage")
too_many_sequences = Fault(
    "too-many-sequences", "More sequences are open at once than the engine was loaded for.", exit="usage"
)


READS_PADDING = "reads_padding"  # among the facts: the model was given masks and did not read them


no_states = Fault(
    "no-states",
    "A model of `native`, `onnx`, `gguf` or `pt2` is asked for what its engine does not keep.\n\n"
    "It gives what comes out of its last step: no hidden states of layers, no attentions. The artifact's other forms, "
    "such as `hf`, give them.",
    exit="usage",
)
not_saved = Fault(
    "not-saved",
    "A model over an engine was told to save itself.\n\n"
    "Its weights lie in files as the engine reads them, beside what says how they are computed. A copy of the "
    "artifact's folder is the model again; a model that the target `hf` wrote saves itself.",
    exit="usage",
)


class Output(dict):
    """`logits` [b, t, vocabulary] float32 and, where asked for, `cache` and `loss`; keys are attributes too."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        keys_text = " and ".join(f"`{key}`" for key in self)
        raise AttributeError(f"the engine gives {keys_text}, and no `{name}`: the target `hf` writes a model that may")


def check_token_ids_in_vocabulary(ids: Tensor, vocab_size: int) -> None:
    """Raises Reject where a token is none of so many."""
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        raise unknown_token(
            f"a token id is outside of the {vocab_size} that the model has",
            help="use the tokenizer that lies beside the weights",
        ).rejection()


class DecoderModel(GenerationMixin, nn.Module):
    """Logits by an engine, and `generate` by transformers over them; not trainable, on the CPU.

    engine      extends sequences by tokens
    plan        `vocabulary` and `context` of the engine; of the native engine, what it runs
    weights     the tensors that it reads; buffers, so that their bytes are counted
    facts       what the artifact says of the model that it was
    generation  values of generation_config.json
    prefix_tokens   tokens of earlier prompts that free sequences hold, for prompts that begin alike
    draft_tokens  of a draft at most, by which callers may speculate; 0 where logits depend on a call's rows
    stored_bytes  bytes of the weights in their file; None where they are those of its buffers
    owner       of what sequences hold: another name where weights change
    reuses_prompts  whether a sequence that holds the begin of a prompt goes on with it
    engine_name   in sentences
    runtime       runs it for its users, and is what is timed; None: this engine

    Source: Optimum's `ORTModelForCausalLM`, a `GenerationMixin` over a session that is no module of torch.
    """

    main_input_name, input_modalities, base_model_prefix = "input_ids", ("text",), ""
    device, dtype = torch.device("cpu"), torch.float32
    _is_stateful = False
    stored_bytes: int | None = None
    owner = ""
    reuses_prompts = True
    draft_tokens = 0
    engine_name = "the native engine"
    runtime: Runtime | None = None

    def __init__(
        self,
        engine: Decoder,
        plan: Mapping[str, Any],
        weights: Mapping[str, Tensor],
        facts: Mapping[str, Any],
        max_sequences: int,
        generation: Mapping[str, Any] | None = None,
        prefix_tokens: int = 0,
    ):
        super().__init__()
        self.engine, self.plan, self.facts = engine, plan, facts
        self.weights = nn.Module()
        for name, tensor in weights.items():
            self.weights.register_buffer(name.replace(".", "/"), tensor)
        self.config: Any = PretrainedConfig()
        sizes = {"vocab_size": plan["vocabulary"], "max_position_embeddings": plan["context"]}
        self.config.update({**sizes, "model_type": facts.get("model_type", "")})
        self.generation_config = parse_generation_config(generation or {})
        skipped = facts.get("uncounted")
        self.uncounted = skipped if type(skipped) is int else None
        self.name_or_path = ""
        self.n_params: int | None = facts.get("params")
        self.call_costs = CallCosts()
        self._pool = SequencePool(engine, max_sequences, prefix_tokens)
        self._lock = ProcessLock()

    def can_generate(self) -> bool:
        return True

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        """Raises Reject (not-saved)."""
        folder = self.name_or_path or "the artifact"
        problem = f"{self.engine_name} reads its files as they are, and writes none"
        raise not_saved(problem, help=f"copy {folder} as a folder: `effc.load` opens the copy").rejection()

    def refuse_states(self, **flags: bool | None) -> None:
        """Raises Reject (no-states) where a call wants hidden states of layers, or attentions."""
        for name in (name for name, flag in flags.items() if flag):
            problem = f"`{name}` asks for what {self.engine_name} does not keep"
            raise no_states(problem, help="leave it out, or emit the model with `hf` too and load that").rejection()

    def check_inputs(self, inputs: Any, mask: Any) -> None:
        """Raises Reject (unfit-inputs) for inputs of `generate` that the model does not take."""
        check_token_id_tensor(inputs)
        check_mask(mask, inputs)

    # -- sequences -------------------------------------------------------------------------------------------

    def exclusive(self) -> AbstractContextManager[Any]:
        """One thread at a time: an engine runs one call."""
        return self._lock.of_this_process()

    def acquire_sequences(self, num_sequences: int) -> list[int]:
        """Numbers of sequences that are free; Reject where the engine has no more."""
        return [number for number, _ in self.start_sequences([()] * num_sequences)]

    def start_sequences(self, prompts: Sequence[Sequence[int]]) -> list[AcquiredSlot]:
        """A sequence for each prompt, and how many of its first tokens it holds already."""
        with self.exclusive():
            if len(prompts) > self.num_free_sequences:
                raise too_many_sequences(
                    f"{len(prompts)} more sequences are asked for, and {self.num_free_sequences} are free",
                    help="load the artifact with a larger `max_sequences=`, or close what is open",
                ).rejection()
            return [self._pool.acquire_slot(prompt if self.reuses_prompts else (), self.owner) for prompt in prompts]

    def release(self, sequences: Sequence[int], token_ids: Sequence[Sequence[int]] = ()) -> None:
        """Free sequences; `token_ids` are the tokens that each has, where they may be gone on with."""
        with self.exclusive():
            for sequence, ids in zip(sequences, token_ids or [()] * len(sequences), strict=True):
                self._pool.release(sequence, ids if self.reuses_prompts else (), self.owner)

    def forget(self, sequence: int, num_remaining: int = 0) -> None:
        """Cut an open sequence back to its first tokens."""
        with self.exclusive():
            self.engine.forget(sequence, num_remaining)

    @contextmanager
    def temporary_sequences(self, count: int) -> Iterator[list[int]]:
        sequences = self.acquire_sequences(count)
        try:
            yield sequences
        finally:
            self.release(sequences)

    @property
    def num_free_sequences(self) -> int:
        """Number of sequences that can still be opened."""
        return len(self._pool)

    def append_tokens(self, tokens_by_sequence: Mapping[int, Tensor], logit_positions: str | int) -> Tensor:
        """Extend sequences by tokens; logits of the last or the first of each row, of so many of its last, or of "all",
        row by row."""
        for sequence, ids in tokens_by_sequence.items():
            length = self.engine.length(sequence) + len(ids)
            if length > self.plan["context"]:
                raise context_full(
                    f"a sequence of {length} tokens is longer than the model's context of {self.plan['context']}",
                    help="give it fewer tokens, or ask for fewer new ones",
                ).rejection()
        ids = torch.cat(list(tokens_by_sequence.values()))
        check_token_ids_in_vocabulary(ids, self.plan["vocabulary"])
        sequences = [sequence for sequence, ids in tokens_by_sequence.items() for _ in range(len(ids))]
        if logit_positions == "first":
            mask = [i == 0 for ids in tokens_by_sequence.values() for i in range(len(ids))]
        else:
            count = (
                logit_positions if isinstance(logit_positions, int) else {"all": len(ids), "last": 1}[logit_positions]
            )
            mask = [i >= len(ids) - count for ids in tokens_by_sequence.values() for i in range(len(ids))]
        with self.exclusive():
            return self.engine.run(ids.tolist(), sequences, mask)

    def _text_mask(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Mask of text tokens; all where the original model treats padding as text."""
        return torch.ones_like(ids) if mask is None or self.facts.get(READS_PADDING) is True else mask

    # -- what transformers' models have ----------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: SequenceCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool = True,
        labels: Tensor | None = None,
    ) -> Output:
        """Logits [b, t, vocabulary]; of masked tokens zeros. Positions are those of a sequence's own tokens.

        labels   [b, t], as `input_ids`: `loss` is then the mean cross-entropy of each token after those before it
        """
        self.refuse_states(output_hidden_states=output_hidden_states, output_attentions=output_attentions)
        check_token_id_tensor(input_ids)
        check_mask(attention_mask, input_ids, 0 if cache is None else cache.get_seq_length())
        if labels is not None:
            text_mask = self._text_mask(input_ids, attention_mask)[:, -input_ids.shape[1] :]
            output = self.forward(input_ids, attention_mask, position_ids, cache, use_cache)
            return Output({"loss": next_token_loss(output.logits, labels, text_mask), **output})
        mask = self._text_mask(input_ids, attention_mask)[:, -input_ids.shape[1] :]
        if position_ids is None and cache is None:  # what goes on from a cache is counted as `generate` does
            refuse_visible_padding(input_ids, mask, self.uncounted)
        keep = min(logits_to_keep or input_ids.shape[1], input_ids.shape[1])
        if cache is None and use_cache:
            cache = SequenceCache(self)
        if cache is not None:
            cache.open_if_closed(len(input_ids))
            logits = self._last_logits(cache.sequences, input_ids, mask, keep)
            cache.append_visible_tokens(input_ids, mask)
            return Output(logits=logits, cache=cache)
        logits = torch.zeros((len(input_ids), keep, self.plan["vocabulary"]))
        for row in range(len(input_ids)):  # row by row: the logits of one fit in memory
            token_ids = input_ids[row][mask[row].bool()].tolist()
            ((number, known),) = self.start_sequences([token_ids[: max(0, len(token_ids) - keep + 1)]])
            final_ids: list[int] = []  # where it breaks off, nobody goes on with what is there
            try:
                logits[row] = self._last_logits([number], input_ids[row, None], mask[row, None], keep, known)[0]
                final_ids = token_ids
            finally:
                self.release([number], [final_ids])
        return Output(logits=logits)

    def _last_logits(
        self, sequences: Sequence[int], ids: Tensor, mask: Tensor, n_last: int, n_cached: int = 0
    ) -> Tensor:
        """The last logits [b, keep, vocabulary] of rows, of which the sequences hold the first `n_cached` tokens."""
        logits = torch.zeros((len(ids), n_last, self.plan["vocabulary"]))
        is_token = mask.bool()
        rows = [row for row in range(len(ids)) if is_token[row].any()]
        fresh = {sequences[row]: ids[row][is_token[row]][n_cached:] for row in rows}
        if not fresh:
            return logits
        values = self.append_tokens(fresh, n_last).split([min(n_last, len(tokens)) for tokens in fresh.values()])
        for row, row_values in zip(rows, values, strict=True):
            last = is_token[row].nonzero()[-n_last:, 0] - (ids.shape[1] - n_last)
            last = last[last >= 0]
            logits[row, last] = row_values[len(row_values) - len(last) :]
        return logits

    @wraps(GenerationMixin.generate, assigned=())
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as transformers does, with its results. `seed` makes the draws of one beam repeatable.

        A row ends at the model's context, too. Interrupted, it leaves the engine ready for the next call.
        """
        candidates = (*args[:1], kwargs.get("inputs"), kwargs.get(self.main_input_name))
        inputs = next((x for x in candidates if x is not None), None)
        if inputs is not None:
            self.check_inputs(inputs, kwargs.get("attention_mask"))
        kwargs = checked_sampling_options(args[1] if len(args) > 1 else kwargs.get("generation_config"), kwargs)
        cache, earlier = SequenceCache(self), kwargs.get("cache")
        try:
            return super().generate(*args, **{**kwargs, "cache": cache if earlier is None else earlier})
        except BaseException as error:
            cache.close()  # who keeps the error keeps no sequence
            if isinstance(error, ValueError) and not isinstance(error, KernelError):  # transformers refuses settings
                raise invalid_sampling(first_line(error).split(". ")[0]).rejection() from error
            raise

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Greedy search and sampling: the engine's own loop, but where tokens are in a cache."""
        cache = kwargs.get("cache")
        if (cache is not None and cache.sequences) or generation_config.is_assistant:
            steps = (input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer)
            return super()._sample(*steps, **kwargs)  # type: ignore[misc, arg-type]  # it names PreTrainedModel
        self.refuse_states(**{n: getattr(generation_config, n) for n in ("output_hidden_states", "output_attentions")})
        run = Generation(self, logits_processor, stopping_criteria, generation_config, streamer, kwargs.get("seed"))
        sequences = self._run_generation(run, input_ids, kwargs)
        if not generation_config.return_dict_in_generate:
            return sequences
        return self._generated(sequences=sequences, logits=run.logits or None, scores=run.scores or None)

    def _assisted_decoding(  # type: ignore[override]  # transformers' has more parameters, which `kwargs` hands on
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        inputs_tensor: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Drafts of the prompt: the engine's own loop. Those of an assistant, and from a cache: transformers'."""
        steps: Any = (input_ids, logits_processor, stopping_criteria, generation_config)
        cache = kwargs.get("cache")
        if generation_config.prompt_lookup_num_tokens is None or (cache is not None and cache.sequences):
            return super()._assisted_decoding(*steps, inputs_tensor=inputs_tensor, **kwargs)  # type: ignore[misc]
        if not self.engine.backward:
            raise ValueError("drafts are for models that can be cut back, and this one keeps states of all tokens")
        if len(input_ids) > 1:
            raise ValueError(f"drafts are for one row, and {len(input_ids)} are given")
        return self._sample(*steps, **kwargs)

    _generated: Any = GenerateDecoderOnlyOutput  # class of what `generate` returns where a dict is asked for

    def _run_generation(self, run: Generation, input_ids: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        return run(input_ids, self._text_mask(input_ids, kwargs.get("attention_mask")))

    def prepare_inputs_for_generation(self, input_ids: Tensor, seed: int | None = None, **kwargs: Any) -> Any:
        """Arguments of `forward` for a step of transformers' loops."""
        if seed is not None:
            help = "call `torch.manual_seed` instead"
            raise invalid_sampling("`seed` is of draws with one beam and no assistant", help=help).rejection()
        kwargs.pop("tokenizer", None)  # of stop strings; transformers hands it on to `forward`
        return super().prepare_inputs_for_generation(input_ids, **kwargs)

    def _prepare_cache_for_generation(  # type: ignore[override]  # what it returns is not read
        self, generation_config: GenerationConfig, model_kwargs: Any, *_: Any
    ) -> None:
        """Sequences of the engine in place of keys and values."""
        if not isinstance(cache := model_kwargs["cache"], SequenceCache):
            help = "hand on the `cache` of an output of this model"
            raise invalid_sampling(
                f"the engine has nothing of the tokens in a {type(cache).__name__}", help=help
            ).rejection()
        if generation_config.use_cache is False:
            del model_kwargs["cache"]

    def _get_logits_processor(self, generation_config: GenerationConfig, *args: Any, **kwargs: Any) -> Any:
        if (generation_config.num_beams or 1) > 1 and not (self.reuses_prompts or self.engine.backward):
            problem = "beams of a model that keeps states read prompts again, whose ends interventions edit"
            raise invalid_sampling(problem, help="take one beam").rejection()
        for name in ("forced_bos_token_id", "forced_eos_token_id"):
            value = getattr(generation_config, name)
            for token in value if isinstance(value, list) else [value]:
                if token is not None and not 0 <= token < self.plan["vocabulary"]:
                    problem = f"`{name}` names a token that is none of the {self.plan['vocabulary']}"
                    raise invalid_sampling(problem).rejection()
        return super()._get_logits_processor(generation_config, *args, **kwargs)  # type: ignore[misc]

    def is_remote_code(self) -> bool:
        return False

    def tie_weights(self, *_: Any, **__: Any) -> None:
        """Tie nothing: the engine reads its files as they are. lm-evaluation-harness calls it of every model."""

    def get_experts_implementation(self) -> dict[str, str]:
        """Implementation of experts that torch runs: the engine has its own."""
        return {}

"""Train the embedded zoo models `tiny-mamba2` and `tiny-hybrid` (Mamba-2 and attention) on the text of `tiny-llama`.

    python recipes/zoo/train_tiny_ssm.py tiny-mamba2 --text kjv.txt
    python recipes/zoo/train_tiny_ssm.py tiny-hybrid --text kjv.txt

`train_tiny_llama.py` says how to get the text. Tokenizer, held-out books, calibration text, batches and schedule
are its, so that the three models' numbers compare. The same options and library versions on the same kind of CPU
give the same weights; transformers' chunked scan is fast enough at these sizes. `--start` goes on from the weights of
an earlier run, with a schedule of its own; the card tells both.
"""

import argparse
import shutil
from pathlib import Path

import torch
from torch import nn
from train_tiny_llama import (
    HELD_OUT,
    WINDOW,
    begin,
    common_parser,
    encode,
    prose,
    save,
    token_stream,
    train,
    write_card,
)
from transformers import (
    AutoTokenizer,
    BambaConfig,
    BambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

TEXTS = Path(__file__).with_name("tiny-llama")
ATTENTION_EVERY = 3  # the last of so many layers of tiny-hybrid attends; the others scan


def make_model(name: str, layers: int, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    ids = {f"{kind}_id": tokenizer.convert_tokens_to_ids(token) for kind, token in tokenizer.special_tokens_map.items()}
    if name == "tiny-mamba2":
        return Mamba2ForCausalLM(
            Mamba2Config(
                vocab_size=len(tokenizer),
                hidden_size=128,
                num_hidden_layers=layers,
                num_heads=8,
                head_dim=32,
                state_size=32,
                n_groups=1,
                chunk_size=64,
                initializer_range=0.04,
                tie_word_embeddings=True,
                rescale_prenorm_residual=False,
                **ids,
            )
        )
    return BambaForCausalLM(
        BambaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            attn_layer_indices=list(range(ATTENTION_EVERY - 1, layers, ATTENTION_EVERY)),
            max_position_embeddings=WINDOW,
            mamba_n_heads=8,
            mamba_d_head=32,
            mamba_d_state=32,
            mamba_n_groups=1,
            mamba_chunk_size=64,
            initializer_range=0.04,
            tie_word_embeddings=True,
            **ids,
        )
    )


def groups(model: nn.Module) -> list[dict]:
    """Matrices shrink by weight decay; what sets a scan's time scale, norms and biases don't."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    return [{"params": matrices}, {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]


DATA = """- **Data, tokenizer, held-out text:** those of `tiny-llama`, whose folder has `calib.txt` and `heldout.txt`;
  the King James Bible (1611), {train_bytes:,} bytes of training text. Held out: {held_books}.
- **Licence:** the text is in the public domain; weights and script are Apache-2.0."""
SUBJECTS = {"tiny-mamba2": "A Mamba-2", "tiny-hybrid": "A hybrid of Mamba-2 and attention layers, each with an MLP,"}


def architecture_text(name: str, config: BambaConfig | Mamba2Config) -> str:
    if name == "tiny-mamba2":
        return (
            f"{config.num_heads} scan heads of {config.head_dim},\n  state {config.state_size}, "
            f"{config.n_groups} group, convolution over {config.conv_kernel}"
        )
    return (
        f"{config.mamba_n_heads} scan heads of {config.mamba_d_head},\n  state {config.mamba_d_state}; layers "
        f"{', '.join(map(str, config.attn_layer_indices))} attend instead, with {config.num_attention_heads} "
        f"query and {config.num_key_value_heads} key/value heads;\n  MLP {config.intermediate_size}"
    )


def arguments() -> argparse.Namespace:
    parser = common_parser(__doc__, steps=3600)
    parser.add_argument("name", choices=list(SUBJECTS))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--start", type=Path, help="folder of an earlier run, whose weights to start from")
    parser.add_argument("--start-steps", type=int, default=0, help="how many steps that run had made")
    parser.add_argument("--start-lr", type=float, default=2e-3, help="its peak learning rate")
    args = parser.parse_args()
    args.out = args.out or Path(__file__).with_name(args.name)
    return args


def main() -> None:
    args = arguments()
    training, held_out = begin(args)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TEXTS / file, args.out / file)
    tokenizer = AutoTokenizer.from_pretrained(TEXTS)
    model = make_model(args.name, args.layers, tokenizer)
    if args.start:
        model.load_state_dict(type(model).from_pretrained(args.start).state_dict())
    stream = token_stream(training, tokenizer)
    facts = train(model, stream, torch.tensor(encode(prose(held_out), tokenizer)), args, groups(model))
    save(model, args.out)
    before = (
        f"a first run of {args.start_steps:,} steps, peak learning rate {args.start_lr:g}, left before its rate\n"
        "  had fallen; then "
    )
    write_card(
        model,
        tokenizer,
        facts,
        args,
        TEXTS,
        [
            f"recipes/zoo/{Path(__file__).name} {args.name} --layers {args.layers}",
            *([f"--start FIRST --start-steps {args.start_steps}"] if args.start else []),
        ],
        name=args.name,
        summary=f"{SUBJECTS[args.name]} of {model.num_parameters():,} parameters, trained long enough that "
        "removing parts visibly costs and healing visibly\nrepairs.",
        data=DATA.format(train_bytes=len(prose(training).encode()), held_books=", ".join(HELD_OUT)),
        parts=architecture_text(args.name, model.config),
        before=before if args.start else "",
        decayed=" on matrices",
        source="`train_tiny_llama.py`",
    )


if __name__ == "__main__":
    main()

"""Train the language model that ships with effcli as `sample:lm`: a byte-level BPE and a small Llama, on a CPU.

    python examples/train_sample_lm.py TEXT_DIR OUT_DIR

TEXT_DIR holds `train.txt` and `valid.txt`. OUT_DIR becomes a Hugging Face directory that stock transformers loads,
with two texts beside the weights: `calibration.txt` (cut out of train.txt) and `evaluation.txt` (cut out of valid.txt,
seen neither by training nor by the choice of the checkpoint). About 20 minutes on one core that multiplies bfloat16.
"""

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END, END_ID = "<|endoftext|>", 0  # the trainer numbers special tokens first
VOCAB = 1024  # a megabyte of text has too few examples of each token for more
CONTEXT = 512  # every position the config promises is trained


def train_tokenizer(text: str) -> Tokenizer:
    """Byte-level BPE: any string can be encoded, so there is no unknown token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def build_model() -> LlamaForCausalLM:
    """About 3.8 M parameters; every width is a multiple of 64, so that groups of 32 or 64 weights divide each row."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=END_ID,
            eos_token_id=END_ID,
        )
    )


def add_dropout(model: nn.Module, p: float) -> None:
    """Llama has no dropout on its residual stream. A hook adds it and leaves no trace in the saved file."""

    def drop(module: nn.Module, _: tuple[Tensor], output: Tensor) -> Tensor:
        return F.dropout(output, p, module.training)

    for name, module in model.named_modules():
        if name.endswith(("embed_tokens", "o_proj", "down_proj")):
            module.register_forward_hook(drop)


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """windows (batch, length + 1) -> mean cross-entropy of the next token, in nats."""
    # bfloat16 products run at about three times the speed where the CPU has them; weights stay in float32.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


def random_windows(tokens: Tensor, batch: int) -> Iterator[Tensor]:
    """tokens (n,) -> endless batches (batch, CONTEXT + 1) that start anywhere in the text."""
    offsets = torch.arange(CONTEXT + 1)
    while True:
        starts = torch.randint(len(tokens) - CONTEXT, (batch, 1))
        yield tokens[starts + offsets]


@torch.no_grad()
def validation_loss(model: nn.Module, tokens: Tensor, length: int = 256) -> float:
    """Mean loss over windows of `length` tokens that do not overlap, in nats per token."""
    model.eval()
    count = (len(tokens) - 1) // length
    # A window takes one token more than it predicts: the first of the next one.
    windows = tokens[: count * length + 1].unfold(0, length + 1, length)
    total = sum(float(loss_of(model, part)) * len(part) for part in torch.split(windows, 16))
    model.train()
    return total / count


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm-up while Adam's second moments are unreliable, then half a cosine down to a twentieth of the peak."""
    warmup = 100
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / (steps - warmup)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(model: nn.Module, train_tokens: Tensor, valid_tokens: Tensor, args: argparse.Namespace) -> None:
    """Train in place; what stays in the model are the weights of the lowest validation loss."""
    # Norm gains are excluded from decay: pulling them to zero would only shrink the block's input.
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    best, best_state = math.inf, model.state_dict()
    batches = random_windows(train_tokens, args.batch)
    started = time.perf_counter()
    model.train()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        loss = loss_of(model, next(batches))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            valid = validation_loss(model, valid_tokens)
            # Text this small is learnt by heart in the end; the last weights need not be the best ones.
            if valid < best:
                best, best_state = valid, {name: tensor.clone() for name, tensor in model.state_dict().items()}
            seconds = time.perf_counter() - started
            print(f"step {step + 1:5d}  train {loss:.3f}  valid {valid:.3f}  {seconds:5.0f} s", flush=True)
    model.load_state_dict(best_state)


def cut(text: str, at: int) -> tuple[str, str]:
    """Cut near character `at`, between two speeches."""
    at = text.index("\n\n", at) + 2
    return text[:at], text[at:]


def main() -> None:
    parser = argparse.ArgumentParser(description="Train effcli's sample language model.")
    parser.add_argument("text_dir", type=Path, help="folder with train.txt and valid.txt")
    parser.add_argument("out_dir", type=Path, help="folder to write")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=4, help=f"windows of {CONTEXT} tokens per step")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--dropout", type=float, default=0.1, help="on the embedding and on both residual branches")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    train_text = (args.text_dir / "train.txt").read_text(encoding="utf-8")
    valid_text = (args.text_dir / "valid.txt").read_text(encoding="utf-8")
    # The text that chooses the checkpoint is not the text that judges it.
    choosing_text, evaluation_text = cut(valid_text, len(valid_text) * 3 // 10)

    tokenizer = train_tokenizer(train_text)
    model = build_model()
    add_dropout(model, args.dropout)
    train_tokens, choosing_tokens, evaluation_tokens = (
        torch.tensor(tokenizer.encode(text).ids) for text in (train_text, choosing_text, evaluation_text)
    )
    print(f"{model.num_parameters():,} parameters, {len(train_tokens):,} tokens to learn from")
    train(model, train_tokens, choosing_tokens, args)

    model.bfloat16()
    print(f"perplexity of evaluation.txt: {math.exp(validation_loss(model, evaluation_tokens)):.2f}")

    model.generation_config = GenerationConfig(bos_token_id=END_ID, eos_token_id=END_ID)
    model.save_pretrained(args.out_dir)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, model_max_length=CONTEXT
    ).save_pretrained(args.out_dir)
    (args.out_dir / "calibration.txt").write_text(cut(train_text, 200_000)[0], encoding="utf-8")
    (args.out_dir / "evaluation.txt").write_text(evaluation_text, encoding="utf-8")


if __name__ == "__main__":
    main()

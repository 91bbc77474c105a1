"""An open_clip model's text half => transformers' CLIPTextModelWithProjection with the same weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from sd_mini.errors import UserError
from sd_mini.text_encoder.encoder import OPEN_CLIP_CLEANING


def converted(model: nn.Module, name: str) -> tuple[CLIPTokenizer, CLIPTextModelWithProjection]:
    """Raises ValueError, the reason named, for any text half but CLIP's own transformer and tokenizer."""
    import open_clip

    text: Any = getattr(model, "text", model)  # a CustomTextCLIP keeps its text half apart, a CLIP is it
    words = open_clip.get_tokenizer(name) if hasattr(text, "token_embedding") else None
    for reason in _hindrances(text, words):
        raise UserError(
            f"open_clip {name!r}: its text half has {reason}, expected CLIP's own transformer and tokenizer; give the "
            "transformers folder of that text model instead"
        )
    tokenizer = _tokenizer(words, text.context_length)
    block = text.transformer.resblocks[0]
    activation = _activation(block.mlp.gelu)
    assert activation is not None  # a block of another one is among the hindrances
    config = CLIPTextConfig(
        vocab_size=text.token_embedding.num_embeddings,
        hidden_size=text.token_embedding.embedding_dim,
        intermediate_size=block.mlp.c_fc.out_features,
        projection_dim=text.text_projection.shape[1],
        num_hidden_layers=len(text.transformer.resblocks),
        num_attention_heads=block.attn.num_heads,
        max_position_embeddings=text.context_length,
        hidden_act=activation,
        layer_norm_eps=text.ln_final.eps,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = CLIPTextModelWithProjection(config)
    encoder.load_state_dict(_renamed(text), strict=True)
    return tokenizer, encoder.eval()


def _hindrances(text: Any, words: Any) -> list[str]:
    """What in an open_clip text half has no counterpart, in words."""
    from open_clip.tokenizer import SimpleTokenizer, _clean_lower

    if not hasattr(text, "token_embedding"):
        return [f"a {type(text).__name__}"]
    found = []
    if type(words) is not SimpleTokenizer or words.clean_fn is not _clean_lower or words.reduction_fn is not None:
        found.append("another tokenizer")
    if getattr(text, "pool_type", getattr(text, "text_pool_type", "argmax")) != "argmax":
        found.append("another pooling")
    if getattr(text, "cls_emb", None) is not None or text.attn_mask is None:
        found.append("no causal mask")
    if not isinstance(text.text_projection, Tensor):
        found.append("no plain projection")
    expected = {"ln_1", "attn", "ls_1", "ln_2", "mlp", "ls_2"}
    for block in text.transformer.resblocks:
        parts = {part for part, module in block.named_children() if not isinstance(module, nn.Identity)}
        if not isinstance(block.attn, nn.MultiheadAttention) or parts - expected or parts & {"ls_1", "ls_2"}:
            found.append("blocks of another kind")
            break
        if _activation(block.mlp.gelu) is None:
            found.append("another activation")
            break
    return found


def _activation(module: nn.Module) -> str | None:
    """transformers' name of a block's activation; none where it has another."""
    if type(module).__name__ == "QuickGELU":
        return "quick_gelu"
    if type(module) is nn.GELU:
        return "gelu_pytorch_tanh" if module.approximate == "tanh" else "gelu"
    return None


def _tokenizer(words: Any, length: int) -> CLIPTokenizer:
    start, end = (words.decoder[number] for number in (words.sot_token_id, words.eot_token_id))
    merges = sorted(words.bpe_ranks, key=words.bpe_ranks.get)
    marks = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    cleaning = {OPEN_CLIP_CLEANING: True}
    return CLIPTokenizer(vocab=dict(words.encoder), merges=merges, model_max_length=length, **marks, **cleaning)


def _renamed(text: Any) -> dict[str, Tensor]:
    """The text half's weights by transformers' names."""
    weights = {
        "embeddings.token_embedding.weight": text.token_embedding.weight,
        "embeddings.position_embedding.weight": text.positional_embedding,
        "final_layer_norm.weight": text.ln_final.weight,
        "final_layer_norm.bias": text.ln_final.bias,
    }
    for i, block in enumerate(text.transformer.resblocks):
        at = f"encoder.layers.{i}."
        attention = block.attn
        for kind in ("weight", "bias"):
            for letter, part in zip("qkv", getattr(attention, f"in_proj_{kind}").chunk(3), strict=True):
                weights[f"{at}self_attn.{letter}_proj.{kind}"] = part
            weights[f"{at}self_attn.out_proj.{kind}"] = getattr(attention.out_proj, kind)
            for ours, theirs in (("layer_norm1", block.ln_1), ("layer_norm2", block.ln_2)):
                weights[f"{at}{ours}.{kind}"] = getattr(theirs, kind)
            for ours, theirs in (("fc1", block.mlp.c_fc), ("fc2", block.mlp.c_proj)):
                weights[f"{at}mlp.{ours}.{kind}"] = getattr(theirs, kind)
    named = {f"text_model.{key}": value.detach() for key, value in weights.items()}
    return {**named, "text_projection.weight": text.text_projection.detach().T.contiguous()}

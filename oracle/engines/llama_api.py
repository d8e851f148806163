"""llama.h and ggml.h of one build of xllamacpp, by `ctypes`: its structs, checked when the library is loaded."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
from ctypes import POINTER, c_bool, c_char, c_char_p, c_float, c_int8, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

from weights.errors import UserError

# The wheel has no header, and fields come and go between builds: a struct read wrongly ends the process.
VERSION = "2026.10.11549"
F32, I32 = 0, 26  # ggml_type
WARN, ERROR = 3, 4  # ggml_log_level
INSTALL = "pip install 'jaxref[llama-cpp]'"


class Tensor(ctypes.Structure):
    """`ggml_tensor`. `ne` are the sizes, the fastest axis first; `nb` the strides in bytes."""

    _fields_ = (
        ("type", c_int32),
        ("buffer", c_void_p),
        ("ne", c_int64 * 4),
        ("nb", c_size_t * 4),
        ("op", c_int32),
        ("op_params", c_int32 * 16),
        ("flags", c_int32),
        ("src", c_void_p * 10),
        ("view_src", c_void_p),
        ("view_offs", c_size_t),
        ("data", c_void_p),
        ("name", c_char * 64),
        ("extra", c_void_p),
        ("padding", c_char * 8),
    )


LOG = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)  # level, text, ours
# A node of the graph; whether this asks if it is wanted, before it is computed; ours.
EVAL = ctypes.CFUNCTYPE(c_bool, POINTER(Tensor), c_bool, c_void_p)


class ModelParams(ctypes.Structure):
    """`llama_model_params`."""

    _fields_ = (
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int32),
        ("load_mode", c_int32),
        ("lazy_mode", c_int32),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
    )


class ContextParams(ctypes.Structure):
    """`llama_context_params`; of `unused` only its size is known."""

    _fields_ = (
        *((name, c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq")),
        *((name, c_uint32) for name in ("n_outputs_max", "n_outputs_max_per_seq")),
        *((name, c_int32) for name in ("n_threads", "n_threads_batch", "ctx_type", "rope_scaling_type")),
        *((name, c_int32) for name in ("pooling_type", "attention_type", "flash_attn_type")),
        *((name, c_float) for name in ("rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor")),
        *((name, c_float) for name in ("yarn_beta_fast", "yarn_beta_slow")),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", EVAL),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("unused", c_void_p * 3),
        *((name, c_bool) for name in ("embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full", "kv_unified")),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
    )


class Batch(ctypes.Structure):
    """`llama_batch`."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


class Memory(ctypes.Structure):
    """`ggml_init_params`."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


# What the library says of itself pins the offsets; every other field is zero.
DEFAULTS: dict[str, tuple[type[ctypes.Structure], dict[str, Any]]] = {
    "llama_model_default_params": (
        ModelParams,
        {"n_gpu_layers": -1, "split_mode": 1, "load_mode": -1, "lazy_mode": 1, "use_extra_bufts": True},
    ),
    "llama_context_default_params": (
        ContextParams,
        {"n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_outputs_max_per_seq": 1}
        | {"n_threads": 4, "n_threads_batch": 4, "type_k": 1, "type_v": 1}
        | dict.fromkeys(("rope_scaling_type", "pooling_type", "attention_type", "flash_attn_type"), -1)
        | dict.fromkeys(("yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow"), -1.0)
        | {"defrag_thold": -1.0, "offload_kqv": True, "no_perf": True, "op_offload": True, "swa_full": True},
    ),
}
# name -> what it returns, what it takes
SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [LOG, c_void_p]),
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, ModelParams]),
    "llama_model_free": (None, [c_void_p]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_init_from_model": (c_void_p, [c_void_p, ContextParams]),
    "llama_free": (None, [c_void_p]),
    "llama_batch_init": (Batch, [c_int32, c_int32, c_int32]),
    "llama_batch_free": (None, [Batch]),
    "llama_decode": (c_int32, [c_void_p, Batch]),
    "llama_get_logits": (POINTER(c_float), [c_void_p]),
    "ggml_op_desc": (c_char_p, [POINTER(Tensor)]),
    "ggml_nbytes": (c_size_t, [POINTER(Tensor)]),
    "ggml_init": (c_void_p, [Memory]),
    "ggml_free": (None, [c_void_p]),
    "ggml_new_tensor_2d": (POINTER(Tensor), [c_void_p, c_int32, c_int64, c_int64]),
    "ggml_mul_mat": (POINTER(Tensor), [c_void_p, POINTER(Tensor), POINTER(Tensor)]),
    "ggml_set_name": (POINTER(Tensor), [POINTER(Tensor), c_char_p]),
    "ggml_get_data": (c_void_p, [POINTER(Tensor)]),
}


@cache
def load() -> Any:
    """The library, its functions typed. Raises `UserError` where it is absent or not the build that this file knows."""
    try:
        version = importlib.metadata.version("xllamacpp")
        spec = importlib.util.find_spec("xllamacpp")
    except (importlib.metadata.PackageNotFoundError, ValueError):
        version = spec = None
    if spec is None or spec.origin is None:
        raise UserError(f"llama.cpp is driven by way of the package xllamacpp, which is not installed: {INSTALL}")
    if version != VERSION:
        raise UserError(f"xllamacpp {version} is installed; only {VERSION} can be driven: {INSTALL}")
    try:
        library = ctypes.CDLL(str(Path(spec.origin).with_name("xllamacpp.abi3.so")))
        for name, (returns, takes) in SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = returns, takes
    except (OSError, AttributeError) as error:
        raise UserError(f"xllamacpp {version} cannot be loaded: {error}: {INSTALL}") from None
    if fault := _fault(library):
        raise UserError(f"xllamacpp {version} is another build than the one this reads: {fault}: {INSTALL}")
    library.llama_backend_init()
    return library


def _fault(library: Any) -> str | None:
    """The first thing that does not lie in the library's structs where it should."""
    for name, (kind, known) in DEFAULTS.items():
        found = getattr(library, name)()
        for field, *_ in kind._fields_:
            value, wanted = getattr(found, field), known.get(field, 0)
            value = any(value) if isinstance(value, ctypes.Array) else value
            if (value or 0) != wanted:
                return f"{name}: {field} is {value}, not {wanted}"
    # A product of two tensors shows where everything that is read of a node lies.
    memory = library.ggml_init(Memory(1 << 14, None, False))
    try:
        a, b = (library.ggml_new_tensor_2d(memory, F32, 3, rows) for rows in (5, 7))
        node = library.ggml_set_name(library.ggml_mul_mat(memory, a, b), b"product")
        seen = node.contents
        found = (seen.type, *seen.ne, *seen.nb[:2], seen.name, seen.src[0], seen.src[1], seen.data)
        addresses = (ctypes.addressof(a.contents), ctypes.addressof(b.contents), library.ggml_get_data(node))
        return None if found == (F32, 5, 7, 1, 1, 4, 20, b"product", *addresses) else f"ggml_tensor: {found}"
    finally:
        library.ggml_free(memory)

"""One view of the mixture-of-experts layers of many models: :func:`iter_moe_blocks` and :func:`swap_router`.

Models differ in where they keep a router and its experts. An adapter reads a block by its *form*, whatever its class:

=============  ==========================================  =======================================================
form           experts                                     for example
=============  ==========================================  =======================================================
fused          ``gate_up_proj`` (E, 2f, D), ``down_proj``  Mixtral, Qwen2/3-MoE, OLMoE, DeepSeek, GraniteMoE, GPT-OSS
module list    one module an expert                        Switch (``wi``, ``wo``); models whose code is on the hub
parallel       ``input_linear``, ``output_linear``         JetMoE
=============  ==========================================  =======================================================

Letters: E experts, D width, f neurons of an expert, T tokens (batch and positions in one), k experts a token. The three
matrices of an expert have the names of the literature: ``act`` goes through the activation (``gate_proj``, ``w1``),
``up`` multiplies it (``up_proj``, ``w3``), ``down`` leads back (``down_proj``, ``w2``). *Router* is what chooses the
experts, and *gate* never means it here.

Nothing is patched: adapters only read, and a swap replaces modules of the one model, and puts them back.
"""

from labkit._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "blocks": ["BlockAdapter", "iter_moe_blocks", "moe_blocks"],
        "matrices": ["ExpertMatrices"],
        "swap": ["RouterSwap", "swap_router"],
    },
)

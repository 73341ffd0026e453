r"""Look into mixtures of experts: are the experts alike, where do they come from, and whom does the router prefer?

Lo, Huang, Qiu, Wang, Fu, "A Closer Look into Mixture-of-Experts in Large Language Models", Findings of NAACL 2025,
arXiv 2406.18219. Nothing is trained: released models are measured.

An expert computes :math:`E(x) = W_{down}\,(W_{up} x \odot \mathrm{act}(W_{act} x))`; its neuron j is row j of
:math:`W_{up}` and :math:`W_{act}` and column j of :math:`W_{down}`. The router's row n stands for expert n.

=====  ==================================================================  ==========================================
what   question                                                            where
=====  ==================================================================  ==========================================
S1     how alike are whole matrices?                                       ``matrix_similarity``
S2     ... their average neurons?                                          ``average_similarity``
S3     ... once the neurons of one are put in the order of the other?      ``match_neurons``, ``random_gain``
S4     do similar router rows go with similar neurons?                     ``ExpertAtlas.router_correlation``
S5     principal components of matrices and of neurons                     ``matrix_pca``, ``neuron_pca``
D1     how alike are the outputs, each expert given every token?           ``output_similarity``
D2     do experts with large outputs get high scores?                      ``norm_score_counts``, ``top_agreement``
D3     how many activated states are not small?                            ``active_share``
D4     which experts are chosen, with which scores?                        ``CapturedExperts.chosen_scores``
=====  ==================================================================  ==========================================

:class:`ExpertAtlas` has them as methods, on a loaded model or, for the static ones, on a checkpoint that is memory-mapped
and read layer by layer. :class:`MoEReport` does all of it in one call.

Where this differs from the authors' notebooks, and why:

* Similarities are float32; theirs are rounded to bfloat16.
* Their matching of neurons for W_up and W_act takes a cosine along an axis that flat vectors do not have; its Grok-1 cell
  asks for matrices by names that it never stored; its DeepSeekMoE cell empties its results in the loop, and takes a shared
  expert for one of the same width. Here all models take one path, and shared experts take part only in averages.
* Their angular similarity gives NaN where two experts agree exactly and rounding lifts the cosine above 1; here cosines are
  clamped.
* Their outputs of DeepSeekMoE's experts are recorded in the order in which the model sorts tokens, which is not the same
  for every expert; here experts are called on the tokens in their own order.
* Their second pass per layer with all experts switched on is not needed: the recorded input of the layer and the experts
  themselves give the same outputs.
* They round each r² to two decimals before the mean over layers; here nothing is rounded.
* Columns that are equal in all experts (freshly copied ones) count as 0 in the projections instead of NaN.

Our addition: matching raises the similarity of *random* matrices too, much so for few neurons of few dimensions.
``random_gain`` and ``rotated_gain`` are the baselines that a gain has to be read against. ``max_neurons`` and the greedy
matching make S3 affordable where the exact assignment, of time f³, is not.
"""

from labkit._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "atlas": ["ExpertAtlas"],
        "captured": ["CapturedExperts", "capture_experts"],
        "checkpoint": ["Checkpoint"],
        "dynamic": [
            "active_share",
            "norm_score_counts",
            "output_similarity",
            "ranks",
            "token_similarity",
            "top_agreement",
        ],
        "matching": [
            "NeuronMatch",
            "kendall_tau",
            "match_neurons",
            "mutual_nearest",
            "random_gain",
            "rotated_gain",
        ],
        "plots": ["norm_score_map", "pca_scatter", "router_scatter", "similarity_map"],
        "report": ["MoEReport"],
        "static": [
            "Projection",
            "average_similarity",
            "matrix_pca",
            "matrix_similarity",
            "neuron_pca",
            "noise_points",
            "pearson",
            "row_similarity",
        ],
        "weights": ["ModelSource", "WeightSource"],
    },
)

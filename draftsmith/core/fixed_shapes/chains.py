"""The part of a draft that batch-invariant decoding verifies.

Shape suffixes: B rows, N nodes of a tree, M nodes of a chain, V vocabulary.
"""

import torch

from draftsmith.core.tree import Draft, chain


def likeliest_chain(draft: Draft) -> Draft:
    """Returns the chain of a tree's first children, from node 0 on, in each row; chains are returned as they are.

    A node's first child is its likeliest, or the first one sampled from the draft distribution. The keys of any other
    path lie in other slots in the tree than in the text, so that attention would add them in another order.
    """
    if draft.tree.is_chain:
        return draft
    num_rows, device = len(draft.tokens_BN), draft.tokens_BN.device
    used = draft.num_nodes or [draft.tree.num_nodes] * num_rows
    paths = []
    for parents, num_used in zip(draft.tree.parents_RN.expand(num_rows, -1).tolist(), used, strict=True):
        path = [0]
        for node in range(1, num_used):
            if parents[node] == path[-1]:
                path.append(node)
        paths.append(path)
    longest = max(map(len, paths))
    # Padding repeats a row's last node.
    index_BM = torch.tensor([path + path[-1:] * (longest - len(path)) for path in paths], device=device)
    probs_BNV, scheme = draft.draft_probs_BNV, draft.sampling_scheme
    chosen_BMV = None
    if probs_BNV is not None and scheme in ("independent", "without_replacement"):
        # Nodes behind the last one with children have no distribution; a chain's last node needs none.
        drawn_from_BM = index_BM[:, :-1].clamp(max=probs_BNV.shape[1] - 1)
        chosen_BMV = probs_BNV[torch.arange(num_rows, device=device)[:, None], drawn_from_BM]
    return Draft(
        tokens_BN=draft.tokens_BN.gather(1, index_BM),
        tree=chain(longest, device),
        num_nodes=[len(path) for path in paths] if min(map(len, paths)) < longest else None,
        draft_probs_BNV=chosen_BMV,
        sampling_scheme="deterministic" if chosen_BMV is None else "independent",
    )

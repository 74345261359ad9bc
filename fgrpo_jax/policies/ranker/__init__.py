"""Rankers of catalogue items: a generator of lists, and the two networks that judge items and lists.

    query      what they read, and how it is made of examples (host)
    network    sizes, tables of parameters, and the layers that all three share
    generator  lists, item by item: sampled, greedy, beam, log-probabilities
    scorers    point-wise scores and the list-wise reward model
    proposals  lists that others would make: heuristics and light rankers, for groups and for selection
    policy     generator, evaluator and point-wise network as policies

Source: GoalRank (arXiv 2509.22046), without its released code; what the paper leaves open is said where
it is decided.
"""

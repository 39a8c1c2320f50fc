"""How the models of the zoo were trained: one module each, `python -m patchwire_worker.zoo.training.facts --out DIR`.

Every module draws from seeds and takes minutes on one core of a CPU. What it writes is what is committed beside it: a
checkpoint as `transformers` saves it, and a card with what was measured on the weights as they were written. Sums of
floats depend on the machine, so another machine gives other weights that do the same.
"""

"""Does it train as well? A study of optimizers that are each tuned with the same effort: ``python -m bench.quality``.

``text.py`` reads the text, ``methods.py`` has the optimizers, ``run.py`` trains one, ``plan.py`` says which runs come
next, ``rows.py`` keeps the results.

``fine_tuning.py`` goes on with a trained model on another text.
"""

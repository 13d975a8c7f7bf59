"""Does it help on *my* model? A comparison with the rigor of our own.

>>> from gradsmooth_optax import trial
>>> def run():
...     result = trial.compare(train, optimizer, depth, rates=[1e-3, 2e-3, 4e-3])
...     print(result)

`train(optimizer, seed)` is your training and returns a metric; `optimizer(smoothing,
rate)` is your optimizer. Needs the extra "trial": `pip install
"gradsmooth_optax[trial]"`.

- `compare`: finds out whether coupling layers helps your training
- `DEFAULT`: the operators that it compares by itself
- `many_seeds`: marks a `train` that trains several seeds at once
- `Result`: a comparison as far as it came; `print` and `plot` it
- `read_result`: a result from its file
- `OtherSettings`: the error that the file is of another comparison
"""

from gradsmooth_optax.trial._arms import DEFAULT as DEFAULT
from gradsmooth_optax.trial._compare import compare as compare
from gradsmooth_optax.trial._job import many_seeds as many_seeds
from gradsmooth_optax.trial._compare import read_result as read_result
from gradsmooth_optax.trial._result import Result as Result
from gradsmooth_optax.trial._store import OtherSettings as OtherSettings

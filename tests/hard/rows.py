"""Bad inputs, a row each: what is made, what is typed, how it must end, what the one line says, what may be left."""
from dataclasses import dataclass

import numpy as np
from hard.makers import (bomb, copied, cut, evil, evil_torch, fewer_rows, file, folder, gone, header, image, link,
                         moved, node, not_finite, other_weights, pipe, raw_folder, replaced, several, sparse, strip,
                         tensors, values)

CHECK = "check {common} --no-time-step"
FT = "run --method ft {common}"
AGAIN = "run --method ft {common} --seed 2"  # goes on with the run that was begun
PREDICT = "predict --checkpoint {ft} --images new"
REPORT = "report --benchmark my --select batch_size=6,epochs=1,model=model,warmup_steps=1"
CLAIMS = REPORT.replace("report", "claims")
MADE = ("expt_logs/my/report*", "expt_logs/my/claims*")  # of a report and of claims
RUN = ("{ft}*",)  # what is in the run
BEGUN = ("{begun}*",)
TABLE = ("predictions.tsv",)
LONG = "x" * 300


@dataclass(frozen=True)
class Row:
    "A bad input."
    name: str
    words: str | list[str]  # of the command
    says: str  # pattern in its one line of error; for code 0 in anything it says
    make: object = None  # changes the folder first
    code: int = 2
    leaves: tuple[str, ...] = ()  # patterns of files and folders that may be new
    changes: tuple[str, ...] = ()  # and of those that may have changed or gone
    env: tuple[tuple[str, str], ...] = ()  # variables
    encoding: str = "utf-8"  # of the terminal


def options(command, table, **more):
    "Rows of one command with an option more: `option value -> pattern`."
    return [Row(f"{command.split()[0]} {option}"[:60], f"{command} {option}", says, **more)
            for option, says in table.items()]


WORDS = [
    Row("a mistyped command", "reprodcue", "did you mean 'reproduce'"),
    Row("an option for a command", "--benchmark glyphs", "unknown command"),
    Row("a command with escape codes", ["\x1b[31mrun\x1b[0m"], r"unknown command '\\x1b"),
    Row("a command that is not UTF-8", ["\udcff"], r"unknown command .*udcff"),
    Row("a command of 10,000 letters", ["r" * 10_000], "unknown command"),
    Row("an empty command", [""], "unknown command"),
    Row("an option with a line break", ["run", "--epo\nchs", "3"], "unknown option"),
    Row("an option that is not UTF-8", ["run", "--\udcfe", "3"], "unknown option"),
    Row("a word too many", "report now", "unexpected argument 'now'"),
    Row("a value is missing", "run --epochs", "expected one argument"),
    Row("a switch that is neither", "run --preflight=maybe", "preflight takes bool"),
    Row("a switch with a number", "check --scan=7", "scan takes bool"),
    Row("a method that is not UTF-8", ["run", "--method", "\udcff"], "UTF-8|unknown method"),
    Row("a method of two lines", ["run", "--method", "ft\nlp"], "unknown method"),
    Row("a method of 10,000 letters", ["run", "--method", "f" * 10_000], "longer than|unknown method"),
    Row("an empty method", ["run", "--method", ""], "method"),
    Row("a benchmark with a NUL", ["run", "--benchmark", "my\0x"], "benchmark"),
    Row("a folder with a NUL", ["run", "--benchmark", "./my\0x"], "folder"),
    Row("a root with a NUL", ["check", "--root", "my\0x"], "root|folder"),
    Row("an out with a NUL", ["run", *"--method ft --benchmark my --model model --out".split(), "x\0y"], "out"),
    Row("a model with a NUL", ["run", "--benchmark", "my", "--model", "./mo\0del"], "model"),
    Row("images with a NUL", ["predict", "--checkpoint", "{ft}", "--images", "n\0"], "images has a NUL|folder"),
    Row("settings without a name", "run --settings =3", "cannot read '=3'|unknown parameter ''"),
    Row("settings without a value", "run --settings lr=", "cannot read 'lr='"),
    Row("settings with one twice", "run --settings lr=1,lr=2", "lr is in the settings twice"),
    Row("settings that nobody knows", "run --settings nonsense=1", "unknown parameter 'nonsense'"),
    Row("a setting of no use", "run --method lp --distillation-coef 1", "lp does not use distillation_coef"),
    Row("a notebook that is not there", "run no.ipynb", "there is no notebook"),
    Row("a notebook that is JSON only", "run own.ipynb", "no notebook", file("own.ipynb", "[1, 2]")),
    Row("a notebook that is binary", "run own.ipynb", "no notebook", file("own.ipynb", bytes(range(256)))),
    Row("a notebook that is a folder", "run own.ipynb", "notebook", folder("own.ipynb")),
    Row("a notebook whose cells are numbers", "run own.ipynb", "notebook", file("own.ipynb", '{"cells": [1]}')),
    Row("a notebook that cannot be parsed", "run own.ipynb", "parameters cell", file(
        "own.ipynb", '{"cells": [{"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": ["a = ("]}]}')),
    *[Row(f"{command} with nonsense", f"{command} --nonsense 1", "unknown option '--nonsense'") for command in
      ("check", "reproduce", "run", "sweep", "report", "claims", "predict", "export", "shrink", "translate",
       "completion bash")],
]

SETTINGS = options("run --method carot {common} --seed 9", {
    "--epochs 0": "epochs must be at least 1", "--epochs three": "epochs takes int", "--epochs 1.5": "epochs takes int",
    "--epochs=-1": "epochs must be at least 1", "--batch-size 0": "batch_size must be at least",
    "--micro-batch-size 0": "micro_batch_size", "--micro-batch-size some": "micro_batch_size",
    "--accumulation-steps 0": "accumulation_steps must be at least 1", "--lr nan": "lr takes float",
    "--lr inf": "lr takes float", "--lr=-1": "lr must be at least 0", "--lr 1e-5x": "lr takes float",
    "--weight-decay=-1": "weight_decay must be at least 0",
    "--label-smoothing 1.5": "label_smoothing must be at most 1",
    "--shots 0": "shots must be at least 1", "--eval-batch-size 0": "eval_batch_size must be at least 1",
    "--eval-every=-1": "eval_every must be at least 0", "--on-bad-image maybe": "unknown on_bad_image",
    "--checkpoint-every=-1": "checkpoint_every must be", "--checkpoint-minutes nan": "checkpoint_minutes takes float",
    "--checkpoint-minutes=-1": "checkpoint_minutes must be", "--report-to paper": "unknown report_to",
    "--workers=-3": "workers must be at least 0", "--workers 100000": "workers must be at most",
    "--precision half": "unknown precision", "--device tpu": "unknown device", "--device cuda:99": "cuda:99",
    "--device ''": "device", "--threads=-1": "threads must be", "--threads 1000000": "threads must be at most",
    "--seed=-1": "seed must be at least 0", "--seed 18446744073709551616": "seed must be at most",
    "--seed 1.5": "seed takes int", "--warmup-steps=-1": "warmup_steps must be",
    "--distillation-coef=-1": "distillation_coef must be", "--teacher-momentum-end 2": "teacher_momentum_end must be",
    "--teacher-kernel magic": "unknown teacher_kernel", "--train-towers none": "unknown train_towers",
    "--templates nothing": "unknown templates", "--templates ''": "templates is empty",
    "--eval-sets ''": "eval_sets is empty", "--eval-sets Nowhere": "unknown evaluation set 'Nowhere'",
    "--eval-sets ,": "eval_sets|evaluation set", "--pretrained ''": "pretrained is empty", "--out ''": "out is empty",
    "--root nowhere": "no folder 'nowhere'", "--root pairs.tsv": "root", "--root my": "root",
    "--out pairs.tsv": "is a file", "--out pairs.tsv/deeper": "is a file", f"--out {LONG}": "out",
    "--processes 0": "processes must be at least 1", "--processes 100000": "processes"})

RUNS = [
    Row("a batch of one pair", "run --method flyp {common} --batch-size 1", "batch_size.*2"),
    Row("warm-up longer than the run", "run --method ft {common} --warmup-steps 99", "warmup_steps"),
    Row("more shots than images", "run --method ft {common} --shots 100", "shots=100"),
    Row("an out that is a loop of links", "run --method ft {common} --out loop", "out", link("loop", "loop")),
    Row("an out whose link leads nowhere", "run --method ft {common} --out lost/x", "out",
        link("lost", "/proc/nowhere/x")),
    Row("templates in a folder", "run --method ft {common} --templates new", "templates"),
    Row("templates in a pipe", "run --method ft {common} --templates t.txt", "templates|t.txt", pipe("t.txt")),
    Row("a benchmark of another name", "run --benchmark glyph", "did you mean 'glyphs'"),
    Row("a benchmark that is a file", "run --benchmark ./pairs.tsv", "no folder"),
    Row("a benchmark that is not there", "run --benchmark ./nowhere", "no folder './nowhere'"),
    Row("a method of no module", "run --method nowhere:MINE", "cannot take 'MINE' from 'nowhere'"),
    Row("a module that fails", "run --method own_a:MINE", "ZeroDivisionError", file("own_a.py", "1/0")),
    Row("a module that cannot be parsed", "run --method own_b:MINE", "SyntaxError", file("own_b.py", "def")),
    Row("a module that ends the process", "run --method own_c:MINE", "own_c", file("own_c.py",
        "import sys; sys.exit(7)")),
    Row("a module without the name", "run --method own_d:MINE", "MINE", file("own_d.py", "")),
    Row("an object that is no method", "run --method json:loads", "not a Method"),
    Row("a benchmark of a module that is none", "run --benchmark json:loads", "not a BenchmarkSpec"),
    Row("one's own benchmark fails", "run --method zs --benchmark own_e:MINE --model model", "KeyError",
        file("own_e.py", "from carot.data import BenchmarkSpec\ndef load(*_, **__): raise KeyError('x')\n"
                         "MINE = BenchmarkSpec('mine', 'Mine', load)"), 1,
        ("error.log", "expt_logs/error.log", "expt_logs/mine*")),
    Row("lp-ft with an empty base", "run --method wise-ft --benchmark my --model model --base ''", "base is empty"),
    Row("a base that is not there", "run --method wise-ft --benchmark my --model model --seed 5", "make it first"),
    Row("a base that trains nothing", "run --method wise-ft --benchmark my --model model --base zs", "zs leaves none"),
]

MANY = options("reproduce {common}", {
    "--methods ''": "methods is empty", "--methods ,": "methods", "--methods ft,flip": "did you mean 'flyp'",
    "--seeds 0": "seeds must be at least 1", "--seeds=-1": "seeds must be at least 1",
    "--seeds two": "seeds takes int", "--seeds 3000000": "seeds must be at most", "--jobs 0": "jobs must be at least 1",
    "--jobs=-1": "jobs must be at least 1", "--jobs 1000000000": "jobs must be at most",
    "--timeout=-1": "timeout must be",
    "--timeout 0": "timeout must be", "--timeout nan": "timeout", "--processes 0": "processes must be at least 1",
    "--metrics nonsense": "unknown metric|nonsense", "--method ft": "did you mean '--methods'",
    "--seed 1": "unknown option '--seed'",
}) + options("sweep --method zs --benchmark my --model model", {
    "": "needs a grid", "--grid ''": "grid", "--grid ';'": "grid", "--grid seed": "cannot read 'seed'",
    "--grid seed=": "cannot read", "--grid seed=1,,2": "cannot read", "--grid '=1'": "cannot read",
    "--grid 'seed=1;seed=2'": "seed is in the grid twice", "--grid nonsense=1": "unknown parameter 'nonsense'",
    "--grid workers=1,2": "workers cannot be swept", "--grid out=a,b": "out cannot be swept",
    "--grid seed=x": "seed takes",
    "--grid seed=1 --seed 2": "seed", "--grid seed=1 --seeds 2": "seeds, or seed",
    "--grid eval_batch_size=0,1": "eval_batch_size must be", "--grid seed=1 --engine cloud": "unknown engine",
    "--grid seed=1 --jobs 0": "jobs must be", "--grid seed=1 --gpus=-1": "gpus must be",
    "--grid seed=1 --gpus 1": "leave gpus out", "--grid seed=1 --timeout nan": "timeout",
    "--grid seed=1 --timeout 0": "timeout must be", "--grid seed=1 --processes=-1": "processes must be"}) + [
    Row("a grid of a million runs", ["sweep", *"--method ft --benchmark my --model model --grid".split(),
        f"lr={','.join(str(i) for i in range(1, 1001))};weight_decay={','.join(str(i) for i in range(1, 1001))}"],
        "1,?000,?000|at most|grid"),
    Row("a sweep's name that leads elsewhere",
        "sweep --method zs --benchmark my --model model --grid seed=1 --name ../../x",
        "1 of 1 runs are complete", code=0, leaves=("expt_logs/my/sweeps*",)),
    Row("an out of two lines for Slurm", ["sweep",
        *"--benchmark my --model model --engine slurm --grid method=ft".split(),
        "--out", "a\n#SBATCH --wrap=x"], "out|job"),
]

TABLES = options("report", {
    "--benchmark nowhere": "no runs in", "--benchmark ''": "benchmark",
    "--benchmark my --select nonsense=1": "nonsense",
    "--benchmark my --select lr=7": "no complete run", "--benchmark my --methods fit": "did you mean 'ft'",
    "--benchmark my --seeds x": "int", "--benchmark my --seeds 77": "no complete run",
    "--benchmark my --out nowhere": "no runs in", "--benchmark my --out pairs.tsv": "no runs in|is a file",
    f"--benchmark my --out {LONG}": "no runs|out|too long"}, leaves=("expt_logs/my/report",)) + options(CLAIMS, {
    "--samples 0": "samples must be", "--samples=-1": "samples must be", "--samples 1000000000000": "samples must be",
    "--samples many": "samples takes int", "--seed=-1": "seed must be"}) + [
    Row("a metric that nobody knows", f"{REPORT} --metrics nonsense", "unknown metric 'nonsense'",
        leaves=("expt_logs/my/report",)),
    Row("claims on nothing", "claims --benchmark nowhere", "no runs in"),
    Row("claims at another setting", "claims --benchmark my --select lr=7", "no complete run|lr",
        leaves=("expt_logs/my/claims",)),
    Row("a report where a file is", REPORT, "is a file|report", file("expt_logs/my/report", "mine")),
]

PREDICTIONS = options(PREDICT, {
    "--batch-size 0": "batch_size must be", "--batch-size=-5": "batch_size must be", "--workers=-3": "workers must be",
    "--workers 100000": "workers must be at most", "--temperature nan": "temperature must be",
    "--temperature 0": "temperature must be", "--temperature=-1": "temperature must be",
    "--temperature inf": "temperature must be", "--temperature hot": "temperature must be",
    "--device tpu": "unknown device",
    "--out my": "my", "--out my/train": "folder", f"--out {LONG}": "out|long|x{20}", "--out pairs.tsv/x": "pairs.tsv",
    "--out ''": "out is empty", "--coverage 1": "coverage must be", "--coverage=-1": "coverage must be",
    "--coverage nan": "coverage takes", "--html pairs.tsv": "no page of predictions", "--html my": "folder",
    "--html pairs.tsv/x": "pairs.tsv"}) + [
    Row("a table in a loop of links", f"{PREDICT} --out loop", "loop", link("loop", "loop")),
    Row("a table with a NUL in its name", ["predict", "--checkpoint", "{ft}", "--images", "new", "--out", "a\0b"],
        "out|null"),
    Row("a table in a pipe", f"{PREDICT} --out p.tsv", "p.tsv", pipe("p.tsv")),
    Row("no checkpoint", "predict --images new", "needs --checkpoint"),
    Row("no images", "predict --checkpoint {ft}", "needs --images"),
    Row("a checkpoint that is not there", "predict --checkpoint nowhere --images new", "no folder 'nowhere'"),
    Row("a checkpoint that is a file", "predict --checkpoint pairs.tsv --images new", "no folder|pairs.tsv"),
    Row("a checkpoint that is no run", "predict --checkpoint my --images new", "not the directory of a run"),
    Row("a checkpoint of a run that was begun", "predict --checkpoint {begun} --images new", "not ended|no student"),
    Row("images that are not there", "predict --checkpoint {ft} --images nowhere", "no folder or file"),
    Row("a folder without a file", "predict --checkpoint {ft} --images none", "no file in", folder("none")),
    Row("a list without a line", "predict --checkpoint {ft} --images l.txt", "no file in|empty", file("l.txt", "\n\n")),
    Row("a list that is binary", "predict --checkpoint {ft} --images l.txt", "none of the|not UTF-8",
        file("l.txt", bytes(range(1, 255)))),
    Row("a list of what is not there", "predict --checkpoint {ft} --images l.txt", "none of the 2 files",
        file("l.txt", "a.png\nb.png")),
    Row("a list that is a pipe", "predict --checkpoint {ft} --images l.txt", "l.txt", pipe("l.txt")),
    Row("an image that is a pipe", "predict --checkpoint {ft} --images l.png", "l.png", pipe("l.png")),
    Row("images that are all broken", "predict --checkpoint {ft} --images bad", "none of the 3 files",
        several(file("bad/a.png"), file("bad/b.jpg", "text"), file("bad/c.webp", bytes(99)))),
    *[Row(f"{what} among the images", PREDICT, says, make, 0, TABLE) for what, make, says in [
        ("an empty file", file("new/x.png"), "the file is empty"), ("a text", file("new/x.png", "text"),
            "cannot identify"),
        ("a cut JPEG", cut("new/0.jpg"), "(?i)truncated|0.jpg"), ("a GIF", image("new/x.png", "GIF"), "it is GIF"),
        ("PostScript", image("new/x.jpg", "EPS"), "it is PostScript"), ("a pipe", pipe("new/x.jpg"), "no regular file"),
        ("a loop of links", link("new/x.jpg", "x.jpg"), "x.jpg"), ("a link to nowhere", link("new/x.jpg", "y"),
            "x.jpg"),
        ("a device", link("new/x.jpg", "/dev/zero"), "no regular file"), ("a terabyte", sparse("new/x.jpg"),
            "too many"),
        ("a bomb", bomb("new/x.png"), "bomb|too large|too many|pixels"), ("a PDF", image("new/x.jpg", "PDF"),
            "it is PDF"),
        ("not a number", values("new/x.tif", np.float32([[0, np.nan]])), "x.tif"),
        ("32 bits", values("new/x.tif", np.full((4, 4), 70_000, np.int32)), "32 bits"),
        ("a name of two lines", file("new/a\nb.png", "text"), r"a\\nb.png"),
        ("a name with a tab", file("new/a\tb.png", "text"), r"a\\tb.png"),
        ("a name that is not UTF-8", file("new/\udcff.png", "text"), "udcff|xff"),
        ("a strip", strip("new/x.png"), "60000 × 1 pixels, differ by more than 256 times"),
        ("a list's folder", file("new/deep/a.png", "text"), "deep/a.png")]],
    *[Row(f"a checkpoint with {what}", PREDICT, says, make) for what, make, says in [
        ("config.json a list", file("{ft}/config.json", "[]"), "config.json"),
        ("config.json cut", cut("{ft}/config.json"), "config.json"),
        ("config.json not UTF-8", file("{ft}/config.json", b"\xff\xfe{"), "config.json"),
        ("config.json too deep", file("{ft}/config.json", "[" * 100_000), "config.json"),
        ("config.json edited", node("{ft}/config.json", "seconds.total", 7), "config.json is not the file"),
        ("classes.json a list", file("{ft}/classes.json", "[]"), "classes.json"),
        ("classes.json cut", cut("{ft}/classes.json"), "classes.json"),
        ("a class fewer", node("{ft}/classes.json", "classnames", ["cat", "dog"]), "classes.json|classes|head"),
        ("classes in another order", node("{ft}/classes.json", "classnames", ["owl", "dog", "cat"]), "classes.json"),
        ("classes that are numbers", node("{ft}/classes.json", "classnames", [1, 2, 3]), "classes.json"),
        ("no classes", node("{ft}/classes.json", "classnames", []), "classes"),
        ("a class of two lines", node("{ft}/classes.json", "classnames", ["a\nb", "c", "d"]), "classes.json"),
        ("a template without its braces", node("{ft}/classes.json", "templates", ["x"]), "template|classes.json"),
        ("a head of fewer classes", tensors("{ft}/student/head.safetensors", fewer_rows), "head"),
        ("a head that is not finite", tensors("{ft}/student/head.safetensors", not_finite), "head"),
        ("another head", tensors("{ft}/student/head.safetensors", other_weights), "head"),
        ("a head that is text", file("{ft}/student/head.safetensors", "head"), "head"),
        ("a head cut short", cut("{ft}/student/head.safetensors"), "head"),
        ("no head", gone("{ft}/student/head.safetensors"), "head"),
        ("weights cut short", cut("{ft}/student/open_clip_model.safetensors", 0.9), "open_clip_model.safetensors"),
        ("other weights", tensors("{ft}/student/open_clip_model.safetensors", other_weights), "open_clip_model"),
        ("an endless header", header("{ft}/student/open_clip_model.safetensors", 2**62), "open_clip_model.safetensors"),
        ("weights of a pickle", evil("{ft}/student/open_clip_model.safetensors"), "open_clip_model.safetensors"),
        ("weights in a pipe", pipe("{ft}/student/open_clip_model.safetensors"), "student|weights"),
        ("a configuration of the model that is a list", file("{ft}/student/open_clip_config.json", "[]"),
         "open_clip_config.json"),
        ("predictions of val that are text", file("{ft}/predictions/val.safetensors", "x"), "val.safetensors"),
        ("predictions of val of other shapes", tensors("{ft}/predictions/val.safetensors", lambda t: t.update(
            logits=t["logits"][:, :2].contiguous())), "val.safetensors")]],
]

SHRINK = "shrink --root my --out small --workers 0"
SHRINKING = options(SHRINK, {
    "--shorter-side 0": "shorter_side must be", "--quality 0": "quality", "--quality 101": "quality",
    "--workers=-1": "workers", "--workers 100000": "workers must be at most",
    "--shorter-side 1000000000": "shorter_side"}) + [
    Row("shrink a folder that is not there", "shrink --root nowhere --out small", "no folder 'nowhere'"),
    Row("shrink a file", "shrink --root pairs.tsv --out small", "no folder|pairs.tsv"),
    Row("shrink into itself", "shrink --root my --out my/small", "another folder"),
    Row("shrink onto itself", "shrink --root my --out my", "another folder"),
    Row("shrink into a file", "shrink --root my --out pairs.tsv", "pairs.tsv"),
    Row("shrink what has no training set", "shrink --root new --out small", "no training set"),
    Row("shrink into a loop", "shrink --root my --out loop", "loop", link("loop", "loop")),
    Row("shrink into a long name", f"shrink --root my --out {LONG}", "x{20}|out"),
    Row("shrink with a NUL", ["shrink", "--root", "my", "--out", "a\0b"], "out|null"),
    Row("shrink nothing", SHRINK, "no image|class", several(gone("my/train"), folder("my/train/cat"),
        folder("my/train/dog")),
        leaves=("small*",)),
    Row("shrink a pipe", SHRINK, "p.png", pipe("my/train/cat/p.png"), 0, ("small*",)),
    Row("shrink a broken image", SHRINK, "0.png", file("my/train/cat/0.png", "x"), 0, ("small*",)),
]

EXPORT = "export --run {ft} --to out"
EXPORTED = options(EXPORT, {
    "--part pupil": "unknown part 'pupil'", "--part teacher": "ft has no teacher", "--part=": "part is empty",
    "--license MIT": "license must be spelt", "--license=": "license is empty", "--push a/b/c": "cannot name",
    "--push=": "push is empty", "--private=maybe": "private takes bool"}) + [
    Row("an export of what is not there", "export --run nowhere --to out", "no folder 'nowhere'"),
    Row("an export of no run", "export --run new --to out", "not the directory of a complete run"),
    Row("an export of a run that was begun", "export --run {begun} --to out", "not the directory of a complete run"),
    Row("an export of a student", "export --run {ft}/student --to out", "not the directory of a complete run"),
    Row("an export into a file", "export --run {zs} --to pairs.tsv", "pairs.tsv is no folder"),
    Row("an export below a file", "export --run {zs} --to pairs.tsv/out", "pairs.tsv.*directory"),
    Row("an export into images", "export --run {zs} --to my", "other folder|another folder"),
    Row("an export into its run", "export --run {zs} --to {zs}", "another folder"),
    Row("an export inside its run", "export --run {zs} --to {zs}/out", "in the run's directory"),
    Row("an export here", "export --run {zs} --to .", "working directory"),
    Row("an export into a loop", "export --run {zs} --to loop", "loop", link("loop", "loop")),
    Row("an export into a pipe", "export --run {zs} --to pipe", "pipe is no folder", pipe("pipe")),
    Row("an export into a long name", f"export --run {{zs}} --to {LONG}", "x{20}.*too long"),
    Row("an export with a NUL", ["export", "--run", "{zs}", "--to", "a\0b"], "to has a NUL"),
    Row("an export over a record that is none", "export --run {zs} --to out", "carot.json",
        file("out/carot.json", "[")),
    Row("an export over a record of pipes", "export --run {zs} --to out", "carot.json",
        several(folder("out"), pipe("out/carot.json"))),
    *[Row(f"an export of {what}", EXPORT, says, make) for what, make, says in [
        ("an edited record", node("{ft}/config.json", "seconds.total", 7), "config.json is not the file"),
        ("no record", gone("{ft}/config.json"), "not the directory of a complete run"),
        ("other classes", node("{ft}/classes.json", "classnames", ["owl", "dog", "cat"]), "classes.json"),
        ("other weights", tensors("{ft}/student/open_clip_model.safetensors", other_weights), "open_clip_model"),
        ("no weights", gone("{ft}/student/open_clip_model.safetensors"), "open_clip_model"),
        ("another head", tensors("{ft}/student/head.safetensors", other_weights), "head"),
        ("other figures", file("{ft}/metrics.tsv", "set\tid\n"), "metrics.tsv"),
        ("predictions that are text", file("{ft}/predictions/Dark.safetensors", "x"), "Dark.safetensors")]],
]

SET = {"no training set": (gone("my/train"), "no folder my/train"), "no validation set": (gone("my/val"), "my/val"),
       "a file for a set": (several(gone("my/val"), file("my/val", "x")), "my/val"),
       "one class": (several(gone("my/train/cat"), gone("my/train/dog")), "at least two|class folder"),
       "a class without images": (several(gone("my/train/cat"), folder("my/train/cat")), "no image"),
       "a class more in val": (folder("my/val/bee"), "bee"), "a class more in a shift": (folder("my/Dark/bee"), "bee"),
       "a shift of one class": (several(gone("my/Dark/cat"), gone("my/Dark/dog")), "one class only"),
       "a shift without images": (several(gone("my/Dark"), folder("my/Dark/cat")), "no image"),
       "a test set and a validation set": (copied("my/Dark", "my/validation"), "validation"),
       "a shift with a reserved name": (moved("my/Dark", "my/Avg. shifts"), "Avg. shifts"),
       "a shift called val-like names": (moved("my/Dark", "my/a\nb"), r"a\\nb"),
       "a shift with a tab": (moved("my/Dark", "my/a\tb"), r"a\\tb"),
       "a shift with escape codes": (moved("my/Dark", "my/\x1b[31m"), r"\\x1b"),
       "a shift of 250 letters": (moved("my/Dark", "my/" + "d" * 250), "at most 200|d{20}"),
       "a class with escape codes": (several(*(moved(f"my/{s}/cat", f"my/{s}/c\x1bt") for s in ("train", "val",
       "Dark"))), r"c\\x1bt"),
       "a class that is not UTF-8": (raw_folder(b"my/train/\xff"), "udcff|xff"),
       "a class that is a loop": (several(gone("my/train/cat"), link("my/train/cat", "cat")), "cat"),
       "classnames empty": (file("my/classnames.txt", " \n"), "classnames.txt is empty"),
       "classnames not UTF-8": (file("my/classnames.txt", b"cat\n\xff\n"), "not UTF-8"),
       "classnames a folder": (folder("my/classnames.txt"), "classnames.txt"),
       "classnames a pipe": (pipe("my/classnames.txt"), "classnames.txt"),
       "classnames twice": (file("my/classnames.txt", "cat\ncat\ndog\nowl\n"), "'cat' twice"),
       "classnames unknown": (file("my/classnames.txt", "cat\ndog\nowl\nbee\n"), "'bee'"),
       "classnames missing one": (file("my/classnames.txt", "cat\ndog\n"), "no line for the class folder 'owl'"),
       "classnames alike": (file("my/classnames.txt", "cat\tA\ndog\ta\nowl\n"), "both called 'a'"),
       "classnames with a NUL": (file("my/classnames.txt", "cat\ta\0b\ndog\nowl\n"), "printable|a.*b"),
       "classnames of 10,000 letters": (file("my/classnames.txt", f"cat\t{'a' * 10_000}\ndog\nowl\n"),
       "at most 200|a{20}"),
       "templates empty": (file("my/templates.txt"), "templates.txt is empty"),
       "templates without braces": (file("my/templates.txt", "a photo"), "exactly one {}"),
       "templates with two": (file("my/templates.txt", "{} and {}"), "exactly one {}"),
       "templates with a number": (file("my/templates.txt", "a {0}"), "exactly one {}"),
       "templates that look inside": (file("my/templates.txt", "{.__class__}"), "exactly one {}"),
       "templates not UTF-8": (file("my/templates.txt", b"\xff {}"), "not UTF-8"),
       "templates a pipe": (pipe("my/templates.txt"), "templates.txt")}

BAD_IMAGES = {"an empty image": file("my/train/cat/0.png"), "a text": file("my/Dark/cat/0.png", "x"),
              "a cut image": cut("my/val/dog/1.png"), "a GIF": image("my/train/owl/2.png", "GIF"),
              "a pipe": pipe("my/train/cat/p.png"), "a bomb": bomb("my/val/cat/b.png"),
              "a loop": link("my/val/cat/l.png", "l.png"), "32 bits": values("my/val/cat/i.tif",
              np.full((4, 4), 70_000, np.int32)),
              "a terabyte": sparse("my/train/cat/s.jpg"), "a strip": strip("my/train/dog/t.png"),
              "a strip in a JPEG": strip("my/Dark/dog/t.jpg")}

DATA = [
    *[Row(f"data: {what}", CHECK, says, make) for what, (make, says) in SET.items()],
    *[Row(f"run on data: {what}", "run --method ft {common} --seed 7", SET[what][1], SET[what][0]) for what in (
        "no validation set", "a class without images", "a shift with a reserved name", "classnames missing one",
        "classnames a pipe", "templates with two", "a class that is not UTF-8")],
    *[Row(f"scan: {what}", f"{CHECK} --scan", "cannot be read", make) for what, make in BAD_IMAGES.items()],
    Row("images of another kind", CHECK, r"\.gif", image("my/train/cat/x.gif", "GIF"), 0),
    Row("a training image that is broken", "run --method ft {common} --seed 7 --no-preflight", "0.png",
        file("my/train/cat/0.png", "x"),
        leaves=("expt_logs/my/ft/*seed=7*",)),
    Row("too many broken ones to skip", "run --method ft {common} --seed 7 --on-bad-image skip --no-preflight",
        "more than 1 %",
        file("my/train/cat/0.png", "x"), leaves=("expt_logs/my/ft/*seed=7*",)),
    Row("an evaluation image that is broken", "run --method ft {common} --seed 7 --no-preflight", "0.png",
        file("my/Dark/cat/0.png", "x"),
        leaves=("expt_logs/my/ft/*seed=7*",)),
]

PAIRS = "run --method flyp {common} --pairs p.tsv"
ROWS_OF_PAIRS = {
    "that is not there": (None, "no file 'p.tsv'"), "without a line": (file("p.tsv"), "is empty"),
    "with a header only": (file("p.tsv", "filepath\ttitle\n"), "no rows"),
    "without the column": (file("p.tsv", "file\ttext\nnew/0.png\tx\n"), "no column 'filepath'"),
    "with a column twice": (file("p.tsv", "filepath\tfilepath\ttitle\na\tb\tc\n"), "2 columns 'filepath'"),
    "that is not UTF-8": (file("p.tsv", b"filepath\ttitle\nnew/0.png\t\xff\n"), "p.tsv"),
    "whose image is not there": (file("p.tsv", "filepath\ttitle\nnew/9.png\tx\n"), "9.png"),
    "without a caption": (file("p.tsv", "filepath\ttitle\nnew/0.png\t\n"), "row 2"),
    "without an image": (file("p.tsv", "filepath\ttitle\n\tx\n"), "row 2"),
    "with a NUL": (file("p.tsv", "filepath\ttitle\nnew/0\0.png\tx\n"), "p.tsv"),
    "that is a folder": (folder("p.tsv"), "p.tsv"), "that is a pipe": (pipe("p.tsv"), "p.tsv"),
    "that is binary": (file("p.tsv", bytes(range(256)) * 20), "p.tsv"),
    "with a short row": (file("p.tsv", "filepath\ttitle\nnew/0.png\n"), "p.tsv"),
    "of one pair": (file("p.tsv", "filepath\ttitle\nnew/0.png\tx\n"), "pair|batch|warmup")}

TRAINING = [
    *[Row(f"a table of pairs {what}", PAIRS, says, make) for what, (make, says) in ROWS_OF_PAIRS.items()],
    Row("pairs for who uses none", "run --method ft {common} --pairs pairs.tsv", "ft does not use pairs"),
    Row("pairs and shots", "run --method flyp {common} --pairs pairs.tsv --shots 1", "shots"),
    Row("a separator of two letters", "run --method flyp {common} --pairs pairs.tsv --pairs-separator xy",
        "pairs_separator is one character"),
    Row("columns that are one", "run --method flyp {common} --pairs pairs.tsv --image-column a --caption-column a",
        "are both 'a'"),
]

CONFIG, WEIGHTS = "model/open_clip_config.json", "model/open_clip_model.safetensors"
MODEL = {
    "without a configuration": (gone(CONFIG), "no open_clip_config.json"),
    "whose configuration is text": (file(CONFIG, "x"), "not valid JSON"),
    "whose configuration is a list": (file(CONFIG, "[]"), "open_clip_config.json"),
    "whose configuration is a pipe": (pipe(CONFIG), "no open_clip_config.json"),
    "whose configuration is 2 MB": (file(CONFIG, " " * 2_000_000), "too large"),
    "whose configuration is too deep": (file(CONFIG, "[" * 100_000), "not valid JSON"),
    "that names a tokenizer": (node(CONFIG, "model_cfg.text_cfg.hf_tokenizer_name", "x"), "transformers"),
    "that trusts code": (node(CONFIG, "model_cfg.text_cfg.tokenizer_kwargs", {"trust_remote_code": True}), "tokenizer"),
    "with an architecture elsewhere": (node(CONFIG, "model_cfg.vision_cfg.timm_model_name", "hf-hub:a/b"), "timm"),
    "of a billion channels": (node(CONFIG, "model_cfg.vision_cfg.width", 10**9), "width"),
    "of another width": (node(CONFIG, "model_cfg.embed_dim", 8), "checkpoint of this model|open_clip_model"),
    "without weights": (gone(WEIGHTS), "no weights"), "whose weights are a pipe": (pipe(WEIGHTS), "no weights"),
    "whose weights are text": (file(WEIGHTS, "x"), "open_clip_model.safetensors"),
    "whose weights are cut": (cut(WEIGHTS), "open_clip_model.safetensors"),
    "whose weights are a pickle": (evil(WEIGHTS), "open_clip_model.safetensors"),
    "with a pickle only": (several(gone(WEIGHTS), evil_torch("model/open_clip_pytorch_model.bin")), "model"),
    "whose header has no end": (header(WEIGHTS, 2**62), "open_clip_model.safetensors"),
    "whose weights are a folder": (several(gone(WEIGHTS), folder(WEIGHTS)), "weights|open_clip_model")}

MODELS = [
    *[Row(f"a model folder {what}", "check {common}", says, make) for what, (make, says) in MODEL.items()],
    *[Row(f"predict by a model folder {what}", "predict --checkpoint {zs} --images new",
          f"{MODEL[what][1]}|weights are others", MODEL[what][0])
      for what in ("whose weights are cut", "that trusts code", "with a pickle only")],
    Row("a model that is not there", "check --benchmark my --model ./nowhere", "no folder '.*nowhere'"),
    Row("a model that nobody knows", "check --benchmark my --model ViT-Z-99", "ViT-Z-99"),
    Row("a model that would fetch code", "check --benchmark my --model roberta-ViT-B-32 --pretrained random",
        "transformers|text"),
    Row("a model at an address", "check --benchmark my --model hf-hub:a/b", "hf-hub:a/b"),
    Row("weights beside a folder's", "check {common} --pretrained random", "pretrained"),
    Row("weights that nobody knows", "check --benchmark my --model ViT-B-16 --pretrained best", "'best'"),
]

RESUMED = [
    *[Row(f"go on with {what}", AGAIN, "config.json is damaged", make, 0, BEGUN, BEGUN) for what, make in [
        ("a config that is a list", file("{begun}/config.json", "[]")), ("a cut config", cut("{begun}/config.json")),
        ("parameters that are a list", node("{begun}/config.json", "parameters", []))]],
    *[Row(f"go on with {what}", AGAIN, says, make, 2) for what, make, says in [
        ("another learning rate on record", node("{begun}/config.json", "parameters.lr", 1), "lr was 1"),
        ("a number of 400 digits on record", node("{begun}/config.json", "parameters.batch_size", 10**400),
            "batch_size was 1000.*choose another out"),
        ("a class renamed", several(*(moved(f"my/{s}/cat", f"my/{s}/zebra") for s in ("train", "val", "Dark"))),
            "class"),
        ("an image more", copied("my/train/cat/0.png", "my/train/cat/9.png"), "train"),
        ("another image", copied("my/train/dog/0.png", "my/train/cat/0.png"), "train"),
        ("another model", tensors(WEIGHTS, other_weights), "weights")]],
    *[Row(f"go on with a checkpoint whose {what}", AGAIN, says, make, code, BEGUN, BEGUN) for what, make, says,
        code in [
        ("manifest is a list", file("{begun}/checkpoints/train/step-00000003/manifest.json", "[]"), "manifest|delete",
            2),
        ("manifest is cut", cut("{begun}/checkpoints/train/step-00000003/manifest.json"), "manifest|delete|step-0", 2),
        ("weights are cut", cut("{begun}/checkpoints/train/step-00000003/student.safetensors"),
            "student|delete|step-0", 2),
        ("optimizer runs code", evil_torch("{begun}/checkpoints/train/step-00000003/optimizer.pt"), "optimizer|step-0",
            2),
        ("state is gone", gone("{begun}/checkpoints/train/step-00000003/state.json"), "state|step-0", 2)]],
]

METRICS = "{ft}/metrics.tsv"
DAMAGE = {
    "no metrics": gone(METRICS), "empty metrics": file(METRICS), "cut metrics": cut(METRICS),
    "binary metrics": file(METRICS, bytes(range(256))), "metrics of words": replaced(METRICS, "\tTrue\t", "\tyes\t"),
    "metrics that are not numbers": replaced(METRICS, "accuracy\t0.", "accuracy\tx."),
    "metrics of a reserved set": replaced(METRICS, "Dark", "Avg. shifts"),
    "metrics of a set with markup": replaced(METRICS, "Dark", "<img src=x onerror=alert(1)>"),
    "metrics of a set with escape codes": replaced(METRICS, "Dark", "\x1b[31m"),
    "metrics without a column": replaced(METRICS, "metric\t", "m\t"), "metrics in a folder": several(gone(METRICS),
    folder(METRICS)),
    "metrics in a pipe": pipe(METRICS), "a config that is a list": file("{ft}/config.json", "[]"),
    "an empty config": file("{ft}/config.json"), "a cut config": cut("{ft}/config.json"),
    "a config in a folder": several(gone("{ft}/config.json"), folder("{ft}/config.json")),
    "a config of words": node("{ft}/config.json", "parameters", "x"), "a config in a pipe": pipe("{ft}/config.json"),
    "an edited config": node("{ft}/config.json", "parameters.workers", 7),
    "a config of other seconds": node("{ft}/config.json", "seconds.total", 10**9),
    "a config without its files": node("{ft}/config.json", "made", {}),
    "cut predictions": cut("{ft}/predictions/Dark.safetensors"),
    "predictions of fewer images": tensors("{ft}/predictions/Dark.safetensors", fewer_rows),
    "predictions that are not finite": tensors("{ft}/predictions/Dark.safetensors", not_finite)}

RESULTS = [
    *[Row(f"report beside {what}", REPORT, "(?i)damaged", make, 0, MADE) for what, make in DAMAGE.items()],
    *[Row(f"claims beside {what}", CLAIMS, "(?i)damaged", DAMAGE[what], 0, MADE) for what in (
        "no metrics", "binary metrics", "a config that is a list", "cut predictions", "predictions of fewer images",
        "predictions that are not finite")],
    *[Row(f"run again with {what}", FT, "accuracy: ID", DAMAGE[what], 0, RUN, RUN) for what in (
        "no metrics", "empty metrics", "cut metrics", "binary metrics", "metrics of a reserved set", "a cut config",
        "a config that is a list", "an empty config", "an edited config", "a config without its files",
        "cut predictions", "predictions of fewer images")],
    *[Row(f"reproduce with {what}", "reproduce --methods zs,ft {common}", "accuracy: ID", DAMAGE[what], 0, (*RUN,
        *MADE),
          (*RUN, *MADE)) for what in ("no metrics", "a config that is a list")],
    *[Row(f"sweep over {what}", "sweep --method zs --grid seed=1 --benchmark my --model model",
        "1 of 1 runs are complete",
          DAMAGE[what], 0, ("expt_logs/my/sweeps*",)) for what in ("a cut config", "binary metrics")],
    Row("a report on one damaged run only", REPORT, "damaged|no complete run", several(
        gone("expt_logs/my/zs"), file(METRICS, "x")), leaves=("expt_logs/my/report*",)),
    Row("a file among the runs", REPORT, "report", file("expt_logs/my/ft/seed=9", "x"), 0, MADE),
    Row("a run without a record", REPORT, "report", folder("expt_logs/my/ft/seed=9"), 0, MADE),
    Row("a run of a strange name", REPORT, "report", folder("expt_logs/my/ft/x\ny,seed=9"), 0, MADE),
]

AROUND = [
    Row("results are sent into a file", FT, "is a file", env=(("CAROT_OUT", "pairs.tsv"),)),
    Row("results are sent to a place that cannot be", FT, "out|CAROT_OUT|long", env=(("CAROT_OUT", LONG),)),
    Row("a launcher's number is a word", FT, "RANK|WORLD_SIZE|LOCAL_RANK|launch", env=(("WORLD_SIZE", "two"),
        ("RANK", "x"))),
    Row("no home", REPORT, "report", None, 0, MADE, env=(("HOME", "/nowhere"),)),
    Row("a terminal of no width", "run --help", "usage: carot run", None, 0, env=(("COLUMNS", "wide"),)),
    Row("a terminal of ASCII for help", "--help", "carot", None, 0, encoding="ascii"),
    Row("a terminal of ASCII for a report", REPORT, "report", None, 0, MADE, encoding="ascii"),
    Row("a terminal of ASCII for translate", ["translate", "--", *"python src/main.py --lr 1e-5".split()], "carot run",
        None, 0,
        encoding="ascii"),
]

OTHERS = options("translate", {
    "": "needs a command", "-- --nonsense 1": "no flag of the public code", "-- --lr": "has no value",
    "-- --lr=much": "--lr takes", "-- '--lr $LR'": "shell variable", "-- 'python \"x'": "cannot read the command",
    "-- --lr 1e-5 x": "belongs to no flag", "-- --lr 1e-5 --lr": "has no value", "--run=maybe": "run takes bool"}) + [
    Row("translate what is not UTF-8", ["translate", "--", "--lr", "\udcff"], "--lr takes|udcff"),
    Row("completion for nobody", "completion", "one of bash, zsh"), Row("completion for fish", "completion fish",
        "unexpected"),
    Row("check what is no benchmark", "check --benchmark new --model model", "train|val"),
    Row("check a name and a root", "check --benchmark my --root my --model model", "root"),
    Row("check ImageNet nowhere", "check --benchmark imagenet", "root"),
    Row("check ImageNet elsewhere", "check --benchmark imagenet --root my --no-time-step",
        "(?i)imagenet|no folder|train"),
    Row("check a thousand million epochs", "check {common} --no-time-step --epochs 1000000000", "ready", None, 0),
]

BOOK = [
    Row("notebooks for nowhere", "notebooks", "needs FOLDER"),
    Row("notebooks for nothing", ["notebooks", ""], "unexpected argument ''"),
    Row("notebooks for two", "notebooks one two", "unexpected argument 'two'"),
    Row("notebooks in a file", "notebooks pairs.tsv", "pairs.tsv.*move away"),
    Row("notebooks below a file", "notebooks pairs.tsv/book", "pairs.tsv.*a file stands"),
    Row("notebooks in a loop", "notebooks loop", "loop", link("loop", "loop")),
    Row("notebooks in a long name", f"notebooks {LONG}", "x{20}.*shorter"),
    Row("notebooks with a NUL", ["notebooks", "a\0b"], "folder has a NUL"),
    Row("notebooks over one's own", "notebooks book", "index.ipynb would be overwritten",
        file("book/index.ipynb", "{}")),
    Row("notebooks over a pipe", "notebooks book", "index.ipynb would be overwritten",
        several(file("book/x"), pipe("book/index.ipynb"))),
    Row("notebooks over a folder", "notebooks book", "index.ipynb would be overwritten", folder("book/index.ipynb")),
    Row("notebooks beside others", "notebooks new", "jupyter lab new/index.ipynb", None, 0, ("new*",)),
]

ROWS = [*WORDS, *SETTINGS, *RUNS, *MANY, *TABLES, *PREDICTIONS, *EXPORTED, *SHRINKING, *DATA, *TRAINING, *MODELS,
        *RESUMED, *RESULTS, *AROUND, *OTHERS, *BOOK]

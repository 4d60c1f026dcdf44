"Commands of the public code: every flag is accounted for, and what is printed trains as the public code would."
import re
import shlex
import subprocess
import sys

import open_clip
import pytest

import carot
from carot import translate
from carot.cli import command_options, main, read_command
from carot.config import RunSettings, describe
from carot.core import UserError
from carot.data import benchmark_spec
from carot.methods.base import all_methods, benchmark_defaults, find_method, settings_of
from carot.translate import CODES, FLAGS, Public, hint, read_public, translation

# the reproduction's README, the backslash before a space included
README = r"""python src/main.py \
--train-dataset=ImageNet --epochs=10 --lr 1e-5 --wd 0.1 --batch-size 256 \ --grad-accum-steps 2 \
--model=ViT-B/16 --eval-datasets=ImageNet,ImageNetV2,ImageNetR,ImageNetA,ImageNetSketch,ObjectNet \
--template=openai_imagenet_template  --save=./checkpoints/ \
--data-location=./datasets/data/ --ft_data="./datasets/csv/imagenet.csv" \
--csv-img-key filepath --csv-caption-key title --exp_name ImageNet/carot \
--cross_fnorm 0.05 --l_orth_wv $OC --distil_coef $SD \
--wb_project "None" --method carot
"""
FILLED = README.replace("$OC", "0.2").replace("$SD", "1.5")
TRAINING = {"method": "carot", "benchmark": "imagenet", "root": "./datasets/data/", "epochs": 10, "batch_size": 512,
            "accumulation_steps": 2, "lr": 1e-5, "weight_decay": 0.1, "warmup_steps": 500, "label_smoothing": 0,
            "distillation_coef": 1.5, "orthogonality_coef": 0.2, "cross_norm_coef": 0.05, "teacher_update_every": 500,
            "teacher_momentum_start": 0.05, "teacher_momentum_end": 0.9, "teacher_warmup_fraction": 0.2,
            "teacher_kernel": "ema", "full_batches": True, "precision": "fp16", "model": "ViT-B-16",
            "pretrained": "openai", "eval_batch_size": 256, "pairs": None, "templates": None, "seed": 1}


def settings(*words):
    "All settings of the run that a public command becomes."
    given = dict(translation(list(words)).settings)
    most = describe(RunSettings)["workers"].high
    if "workers" in given: given["workers"] = min(given["workers"], most)  # what is too many depends on the machine
    method = find_method(given["method"]) if "method" in given else find_method("carot")
    return vars(settings_of(method, benchmark_defaults(method, benchmark_spec("imagenet")), given)[0])


def of_shell(text):
    "The words that a shell hands over."
    code = "import sys; print(*sys.argv[1:], sep='\\0', end='')"
    out = subprocess.run(["bash", "-c", f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} {text}"],
                         capture_output=True, text=True, check=True).stdout
    return out.split("\0")


@pytest.mark.parametrize("words", [
    [FILLED], shlex.split(FILLED), of_shell(FILLED), FILLED.replace('"', "").split(),
    [f"OC=0.2 # orthogonality\nSD=1.5 # distillation\n\n{README}"]], ids="whole split shell blanks variables".split())
def test_the_command_of_the_reproduction(words):
    found, known = translation(words), settings(*words)
    assert {name: known[name] for name in TRAINING} == TRAINING
    assert found.public.code.name == "reproduction" and not found.unsupported
    given = {"--" + name for name in re.findall(r"--([\w-]+)", README)}
    assert len(given) == 20 and given <= {row.there.split()[0] for row in found.rows}
    assert all(row.kind in ("same", "renamed") or row.why for row in found.rows)
    assert "--batch-size 512 --micro-batch-size 256" in found.warnings[0]
    assert {"--full-batches", "--precision"} <= set(of_shell(found.command))


def test_the_shell_reads_the_printed_command_back():
    found = translation([FILLED])
    words = of_shell(found.command)
    assert words[:2] == ["carot", "run"]
    assert read_command("run", words[2:]) == found.settings


@pytest.mark.parametrize("words, message", [
    ("--l_orth_wv $OC", "--l_orth_wv takes a number, not the shell variable '$OC'"), ("--lr ${E}", "shell variable"),
    ("--model=$arch --lr 1", "shell variable"), ("--epochs 1.5", "takes a whole number, not '1.5'"),
    ("--lr --wd 1", "--lr has no value"), ("--csv title", "--csv may be --csv-img-key or"),
    ("--wdd 1", "did you mean '--wd'"), ("--lr 1 2", "'2' belongs to no flag"), ("'--lr 1", "No closing quotation"),
])
def test_refusals_are_one_line(words, message):
    with pytest.raises(UserError) as error: translation([words])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert main(["translate", "--", words]) == 2


def test_prefixes_and_forms_are_argparse_s():
    for words in ("--train-d=ImageNet --epo 3 --l_orth=0.2", "--train-dataset ImageNet --epochs=3 --l_orth_wv 0.2"):
        assert read_public([words]).given == {"--train-dataset": "ImageNet", "--epochs": 3, "--l_orth_wv": 0.2}
    assert read_public(["--alpha 0.1 0.5 --lr 1"]).texts["--alpha"] == "0.1 0.5"
    assert read_public(["--wb_project '' --no-ce_ablation"]).given == {"--wb_project": "", "--no-ce_ablation": True}
    assert read_public(["--lr 1 --lr 2"])["--lr"] == 2


CODE = {code.name: code for code in CODES}
PARSERS = {  # names of each public parser, as its args.py has them
    "FLYP": """--data-location --eval-datasets --train-dataset --template --classnames --alpha --exp_name --results-db
        --model --batch-size --lr --wd --ls --warmup_length --num_classes --epochs --load --save --freeze-encoder
        --cache-dir --fisher --fisher_floor --ft_data --dataset-type --train-num-samples --k --seed --workers
        --csv-separator --csv-img-key --csv-caption-key --clip_load --wise_save --run --get_labeled_csv --min_lr"""}
PARSERS["CaRot"] = PARSERS["FLYP"] + """ --vis_calibration --ce_ablation --no-ce_ablation --head_path --distil_coef
    --ema_up_freq --m_sche_src --m_sche_tar --m_warm_up --cross_fnorm --l_orth_wv --wb_project --method --use_fp16
    --temperature_scale --full_eval"""
PARSERS["reproduction"] = PARSERS["CaRot"] + " --grad-accum-steps --adv_training"


@pytest.mark.parametrize("code", PARSERS)
def test_every_flag_of_the_public_parsers_is_known(code):
    assert {n for n, flag in FLAGS.items() if CODE[code].has(flag) and n[0] == "-"} == set(PARSERS[code].split())


@pytest.mark.parametrize("name", [name for name in FLAGS if name.startswith("--")])
def test_every_flag_alone_has_a_row(name):
    flag = FLAGS[name]
    text = {bool: [], int: ["3"], float: ["0.3"], list: ["0.1", "0.2"]}.get(flag.takes, ["x"])
    found = translation([name, *text])
    [row] = [row for row in found.rows if row.there.split()[0] == name]
    assert row.kind in ("same", "renamed", "unnecessary", "not supported")
    assert row.settings or row.why, row
    every = {setting for method in all_methods().values() for setting in method.known}
    assert set(row.settings) <= every and (not flag.setting or flag.setting in every)


ALWAYS = "--train-dataset=ImageNet --model=ViT-B/16 --data-location=d "
SCRIPTS = [  # example scripts of the public codes, and settings that must come of them
    ("--epochs=10 --lr 3e-5 --wd 0.1 --batch-size 512 --method ft",
     dict(method="ft", lr=3e-5, batch_size=512, distillation_coef=0, full_batches=False, precision="fp16")),
    ("--epochs=0 --method zs", dict(method="zs", precision="fp32")),
    ("--epochs=10 --lr=1e-5 --wd=0.1 --batch-size=512",
     dict(method="flyp", lr=1e-5, full_batches=True, precision="fp32", warmup_steps=500)),
    ("", dict(method="flyp", lr=1e-3, batch_size=128, eval_batch_size=128, epochs=10)),
    ("--method flyp", dict(method="flyp", lr=1e-5, batch_size=512, precision="fp16")),
    ("--method carot", dict(method="carot", distillation_coef=0, orthogonality_coef=0, cross_norm_coef=0)),
    ("--method carot --distil_coef 1.5", dict(distillation_coef=1.5, orthogonality_coef=0)),
    ("--method flyp --cross_fnorm 0.05", dict(method="carot", cross_norm_coef=0.05, distillation_coef=0)),
    ("--method ft --distil_coef 1.5", dict(method="ft", distillation_coef=0, lr=1e-5)),
    ("--ce_ablation --distil_coef 1.5 --l_orth_wv 0.2",
     dict(method="ft", distillation_coef=1.5, orthogonality_coef=0.2)),
    ("--method lp --freeze-encoder --lr 1e-2 --epochs 5", dict(method="lp", lr=1e-2, epochs=5)),
    ("--method lpft --head_path x --epochs 5", dict(method="lp-ft", epochs=5, lr=1e-5)),
    ("--method lpft", dict(method="lp-ft", epochs=10)),
    ("--method carot --distil_coef 1 --ema_up_freq 0", dict(teacher_kernel="still")),
    ("--method carot --use_fp16 0 --run 3 --k 16 --ls 0.1",
     dict(precision="fp32", seed=3, shots=16, label_smoothing=0.1)),
    ("--method carot --m_sche_src 0.1 --m_sche_tar 1 --m_warm_up 0.5 --distil_coef 1 --ema_up_freq 100",
     dict(teacher_momentum_start=0.1, teacher_momentum_end=1, teacher_warmup_fraction=0.5, teacher_update_every=100)),
]


@pytest.mark.parametrize("words, wanted", SCRIPTS, ids=[words or "none" for words, _ in SCRIPTS])
def test_training_is_the_public_one(words, wanted):
    found = settings(ALWAYS + words)
    assert {name: found.get(name) for name in wanted} == wanted


TRACER = ALWAYS + ("--epochs 10 --lr 1e-5 --wd 0.1 --batch-size 512 --cross_fnorm 0.05 --distil_coef 0.9 --l_orth_wv 0 "
                   "--max_grad_norm 0 --grad_norm_multiplier 0 --warmup_length 500 --method tracer --use_fp16 1 "
                   "--ema_up_freq 0 --alpha_fd 2000 --alpha_cross_kd 1 --alpha_icl 1 --alpha_crd 1 --workers 32")


def test_tracer():
    found = settings(TRACER)
    wanted = dict(method="tracer", distillation_coef=0.9, feature_coef=2000, relation_coef=1, interaction_coef=1,
                  cross_coef=1, cross_norm_coef=0.05, orthogonality_coef=0, teacher_beta=0.5, precision="bf16")
    assert {name: found[name] for name in wanted} == wanted and not translation([TRACER]).unsupported
    alone = re.sub(r"--alpha_\w+ \S+", "", TRACER)
    assert settings(alone)["method"] == "carot-beta"
    assert settings(alone + " --ema_teacher")["method"] == "carot"
    assert "--ema_up_freq 5" in translation([TRACER.replace("freq 0", "freq 5")]).unsupported
    assert "(--max_grad_norm 0.0001)" in translation([TRACER.replace("--max_grad_norm 0", "")]).unsupported


@pytest.mark.parametrize("name", ["RN50", "RN101", "RN50x4", "RN50x16", "ViT-B/32", "ViT-B/16", "ViT-L/14",
                                  "ViT-L/14@336px"])
def test_models_have_names_of_open_clip(name):
    plain, own = (settings(f"--method zs --model {name}{more}")["model"] for more in ("", " --clip_load w.pt"))
    assert {plain, own} <= set(open_clip.list_models()) and own.endswith("-quickgelu")


def test_a_file_of_pairs():
    found = translation(["--train-dataset=Own --data-location=own --ft_data=own.csv --csv-img-key a --method carot"])
    given = found.settings
    assert given["benchmark"] == "own" and "root" not in given and given["pairs"] == "own.csv"
    assert (given["pairs_separator"], given["image_column"], given["caption_column"]) == ("tab", "a", "title")
    assert given["epochs"] == 10 and found.unsupported == ["--train-dataset Own"]  # nothing is known of that folder


def test_what_is_not_supported_is_not_run(capsys):
    assert main(["translate", "--run", "--", "--method", "carot", "--min_lr", "1e-7"]) == 2
    out, err = capsys.readouterr()
    assert out.startswith("carot run --method carot") and err.count("\n") == 1 and "--min_lr 1e-7" in err


def test_run(monkeypatch):
    made = {}
    monkeypatch.setattr(translate, "run_one", lambda **given: made.update(given) or 7)
    words = ["A_B=1", "python", "main.py", "--method", "zs", "--epochs", "0", "--run", "2"]
    assert main(["translate", "--run", *words]) == 7 and made["method"] == "zs" and made["seed"] == 2
    assert not made["root"].startswith("~")
    assert translate.os.environ.pop("A_B") == "1"
    assert translation(words).command.startswith("A_B=1 carot run ")


def test_hints():
    known = command_options("run").known
    wanted = {"--wd": "--wd is --weight-decay here", "--ls": "--ls is --label-smoothing here",
              "--ema-up-freq": "--ema_up_freq is --teacher-update-every here", "--k": "--k is --shots here",
              "--exp_name": "--exp_name is unnecessary here", "--fisher": "--fisher is not supported here"}
    assert all(hint(word, known).startswith(said) for word, said in wanted.items())
    assert hint("--lr", known) == hint("--epoch", known) == ""


def test_translate_is_light():
    code = "import sys, carot.translate; sys.exit(bool({'torch', 'open_clip', 'pandas'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_public_defaults():
    assert Public(CODE["FLYP"], {})["--lr"] == 1e-3 and Public(CODE["CaRot"], {})["--lr"] == 1e-5
    assert carot.translate.FLAGS["--method"].fate == "same"

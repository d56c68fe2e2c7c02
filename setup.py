from setuptools import find_packages, setup

FLOORS = ("transport", "dht", "learning", "node", "sim")
found = find_packages(include=[g for f in FLOORS for g in (f, f + ".*")], exclude=["node.api*"])
setup(
    packages=["shoal", *("shoal." + p for p in found)],
    package_dir={"shoal": "node/api", **{"shoal." + f: f for f in FLOORS}},
)

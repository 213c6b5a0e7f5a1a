"Everything that pyproject.toml calls dynamic, read from settings.ini"
import re, tomllib
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup, find_packages

here = Path(__file__).parent
ini = ConfigParser(delimiters=['='])
ini.read(here/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
source = tomllib.loads((here/'pyproject.toml').read_text(encoding='utf-8'))['project']['urls']['Source']

licenses = {'apache2': 'Apache-2.0'}
statuses = {'3': '3 - Alpha', '4': '4 - Beta', '5': '5 - Production/Stable'}
suffix = '_requirements'
package = cfg['lib_name']

def anywhere(text):
    "README.md with links that work outside the repository: pictures as they are, the rest as GitHub shows it"
    kind = lambda path: 'raw' if path.endswith(('.jpg','.png','.gif','.svg')) else 'blob'
    return re.sub(r'\]\((nbs/[^)\s]+)\)', lambda m: f"]({source}/{kind(m[1])}/main/{m[1]})", text)

setup(
    version = cfg['version'],
    python_requires = f">={cfg['min_python']}",
    description = cfg['description'],
    long_description = anywhere((here/'README.md').read_text(encoding='utf-8')),
    long_description_content_type = 'text/markdown',
    keywords = cfg['keywords'].split(),
    license_expression = licenses[cfg['license']],
    author = cfg['author'],
    author_email = cfg['author_email'],
    classifiers = [
        f"Development Status :: {statuses[cfg['status']]}",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        'Programming Language :: Python :: 3',
        'Topic :: Scientific/Engineering :: Image Recognition'],
    packages = find_packages(include=[package, package + '.*']),
    # what a wing may hold beside its modules: weights, templates, pictures
    package_data = {'': ['py.typed', '*.safetensors', '*.html', '*.css', '*.json', '*.jpg', '*.png']},
    install_requires = cfg['requirements'].split(),
    extras_require = {k.removesuffix(suffix): v.split() for k,v in cfg.items() if k.endswith(suffix)},
    entry_points = {
        'console_scripts': cfg['console_scripts'].split(),
        'nbdev': [f"{package} = {package}._modidx:d"]},
)

"Deep equilibrium object detection, literate and in pure PyTorch"

def __getattr__(name):
    "`__version__`, which settings.ini says, from the metadata of the installed package"
    if name!='__version__': raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from importlib.metadata import version
    return version(__name__)

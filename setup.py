from setuptools import setup, find_packages
setup(name='deqdet', version='0.0.1', packages=find_packages(include=['deqdet*']), entry_points={'nbdev':['deqdet=deqdet._modidx:d']})

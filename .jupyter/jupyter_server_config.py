def nbdev_clean_jupyter(**kwargs):
    "Clean a notebook when it is saved, so that `git diff` shows what a person wrote."
    try:
        from nbdev.clean import clean_jupyter
    except ModuleNotFoundError:
        return
    clean_jupyter(**kwargs)


c.ContentsManager.pre_save_hook = nbdev_clean_jupyter  # noqa: F821  (Jupyter provides `c`)

"""Command lines as other programs' users write them."""

from typer.core import TyperCommand

TRUTHS = {"true": True, "false": False}


class Forgiving(TyperCommand):
    """Takes `--word_timestamps True` for `--word_timestamps`, as openai-whisper has it."""

    def parse_args(self, ctx, args):
        names = {
            ctx.token_normalize_func(name.lstrip("-")): option
            for option in self.params
            if getattr(option, "is_flag", False)
            for name in option.opts
        }
        given, left = [], list(args)
        while left:
            one = left.pop(0)
            option = names.get(ctx.token_normalize_func(one.lstrip("-"))) if one.startswith("--") else None
            value = TRUTHS.get(left[0].lower()) if option and left else None
            if value is not None:
                left.pop(0)
                one = one if value else next(iter(option.secondary_opts), None)
            given += [one] if one else []
        return super().parse_args(ctx, given)

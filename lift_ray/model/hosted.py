from typing import Any


def host(trunk: Any, name: str) -> Any:
    raise NotImplementedError(name)


def timm_projection(visual: Any) -> Any:
    last = list(visual.head.children())
    if not last:
        h = visual.trunk.get_classifier()
        if hasattr(h, "weight"):
            return h.weight.T.detach(), None if h.bias is None else h.bias.detach(), None
        return None, None, None
    l = last[-1]
    if hasattr(l, "weight"):
        return l.weight.T.detach(), l.bias, None
    return None, None, visual.head

import torch

from ressl.batch import Batch
from ressl.collectives import alone
from ressl.config import LocalBatchNorm, ReSSLConfig, SmallResNet, SplitBatchNorm
from ressl.loss import relational_loss
from ressl.method import ReSSL, build_method

CFG = ReSSLConfig(name="ressl", hidden_dim=16, embed_dim=8, queue_size=24, teacher_momentum=0.9)


def make(batchnorm: object = LocalBatchNorm()) -> ReSSL:  # noqa: B008
    torch.manual_seed(0)
    return build_method(CFG, SmallResNet(name="resnet_small", width=4, batchnorm=batchnorm), alone())


def batch(views: int = 1, count: int = 8) -> Batch:
    strong = tuple(torch.randn(count, 3, 16 - 2 * i, 16 - 2 * i) for i in range(views))
    index = torch.arange(count)
    return Batch(weak=(torch.randn(count, 3, 16, 16),), strong=strong, index=index, label=index)


def test_the_loss_compares_every_strong_view_with_the_weak_one() -> None:
    method, data = make(), batch(views=3)
    out = method(data)
    student = torch.cat([method.student(view) for view in data.strong])
    teacher = method.teacher(data.weak[0]).repeat(3, 1)
    expected = relational_loss(student, teacher, method.queue.keys, student_temperature=0.1, teacher_temperature=0.04)
    torch.testing.assert_close(out.loss, expected)


def test_forward_changes_neither_queue_nor_teacher() -> None:
    method = make()
    before = {k: v.clone() for k, v in method.state_dict().items() if "running" not in k and "tracked" not in k}
    method(batch()).loss.backward()
    assert all(torch.equal(method.state_dict()[k], v) for k, v in before.items())


def test_gradients_reach_the_whole_student_and_nothing_else() -> None:
    method = make()
    method(batch()).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.student.parameters())
    assert all(p.grad is None for p in method.teacher.parameters())


def test_after_step_pushes_the_keys_and_moves_the_teacher() -> None:
    method = make()
    with torch.no_grad():
        for p in method.student.parameters():
            p.add_(1.0)
    old = [p.clone() for p in method.teacher.parameters()]
    keys = torch.randn(10, 8)
    method.after_step(keys, momentum=method.cfg.teacher_momentum)
    assert torch.equal(method.queue.keys[:10], keys) and method.queue.cursor == 10
    for new, before, student in zip(method.teacher.parameters(), old, method.student.parameters(), strict=True):
        torch.testing.assert_close(new, 0.9 * before + 0.1 * student)


def test_keys_come_in_the_order_of_the_batch_under_every_policy() -> None:
    """In evaluation mode no image depends on its company, so a wrong order would show."""
    method = make(SplitBatchNorm(name="split", groups=2)).eval()
    data = batch()
    torch.testing.assert_close(method(data).carry[0], method.teacher(data.weak[0]))


def test_the_teacher_stays_in_training_mode_with_statistics_of_its_own() -> None:
    method = make().train()
    method(batch())
    student = method.student.get_buffer("backbone.stem.1.running_mean")
    teacher = method.teacher.get_buffer("backbone.stem.1.running_mean")
    assert not torch.equal(student, teacher) and teacher.abs().sum() > 0

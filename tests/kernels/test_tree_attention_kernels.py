def test_device(device):
    assert device


def test_gpu(gpu):
    assert gpu

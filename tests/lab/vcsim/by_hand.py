"""What somebody does or sees at a host past Snaptree, with VMware's own client.

    by_hand.py URL USER PASSWORD see                      every machine as JSON: power, current, tree
    by_hand.py URL USER PASSWORD take MACHINE NAME        takes a snapshot
    by_hand.py URL USER PASSWORD revert MACHINE NAME      goes back to one
    by_hand.py URL USER PASSWORD remove MACHINE NAME      deletes one
    by_hand.py URL USER PASSWORD attach MACHINE MODE      attaches a new disk of that mode (persistent, ...)
    by_hand.py URL USER PASSWORD detach MACHINE LABEL     detaches the disk of that label

The certificate is not verified: it is the simulator's, on this machine.
"""

import json
import ssl
import sys
import time
from urllib.parse import unquote, urlparse

from pyVim.connect import Disconnect, SmartConnect
from pyVmomi import vim


def nodes(roots, parent=None):
    for node in roots:
        yield node, parent
        yield from nodes(node.childSnapshotList, node)


def tree(machine):
    info = machine.snapshot
    return list(nodes(info.rootSnapshotList)) if info else []


def seen(machine):
    info = machine.snapshot
    current = info.currentSnapshot._moId if info and info.currentSnapshot else None
    by_id = {node.snapshot._moId: unquote(node.name) for node, _ in tree(machine)}
    return {
        "name": machine.name,
        "power": machine.runtime.powerState,
        "current": by_id.get(current, current),
        "consolidate": bool(machine.runtime.consolidationNeeded),
        "snapshots": [
            {
                "name": unquote(node.name),
                "parent": unquote(parent.name) if parent else None,
                "state": node.state,
                "quiesced": node.quiesced,
                "description": node.description,
            }
            for node, parent in tree(machine)
        ],
    }


def wait(task):
    while task.info.state not in ("success", "error"):
        time.sleep(0.02)
    if task.info.state == "error":
        raise SystemExit(f"the task failed: {task.info.error}")


def changed(machine, act, what):
    disks = [device for device in machine.config.hardware.device if isinstance(device, vim.vm.device.VirtualDisk)]
    spec = vim.vm.device.VirtualDeviceSpec()
    if act == "detach":
        spec.operation = "remove"
        spec.device = next(disk for disk in disks if disk.deviceInfo.label == what)
        return spec
    spec.operation, spec.fileOperation = "add", "create"
    backing = vim.vm.device.VirtualDisk.FlatVer2BackingInfo(fileName="", diskMode=what, thinProvisioned=True)
    spec.device = vim.vm.device.VirtualDisk(
        key=-1, controllerKey=disks[0].controllerKey, unitNumber=len(disks) + 1, capacityInKB=4096, backing=backing
    )
    return spec


def main(url, user, password, act, *rest):
    at = urlparse(url)
    context = ssl._create_unverified_context()
    service = SmartConnect(host=at.hostname, port=at.port, user=user, pwd=password, sslContext=context)
    try:
        content = service.RetrieveContent()
        view = content.viewManager.CreateContainerView(content.rootFolder, [vim.VirtualMachine], True)
        machines = {machine.name: machine for machine in view.view}
        if act == "see":
            print(json.dumps({name: seen(machine) for name, machine in machines.items()}))
            return
        machine, name = machines[rest[0]], rest[1]
        if act == "take":
            wait(machine.CreateSnapshot_Task(name=name, description="by hand", memory=False, quiesce=False))
            return
        if act in ("attach", "detach"):
            wait(machine.ReconfigVM_Task(vim.vm.ConfigSpec(deviceChange=[changed(machine, act, name)])))
            return
        found = next(node.snapshot for node, _ in tree(machine) if unquote(node.name) == name)
        if act == "revert":
            wait(found.RevertToSnapshot_Task())
        else:
            wait(found.RemoveSnapshot_Task(removeChildren=False))
    finally:
        Disconnect(service)


main(*sys.argv[1:])

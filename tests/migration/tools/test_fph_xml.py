# SPDX-License-Identifier: GPL-2.0-or-later
"""What scripts/fph makes of a domain's XML: hints on or off, and everything else as it was."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Optional, Sequence
from xml.etree import ElementTree

import pytest

from livefph import domainxml
from livefph.connection import FphError
from livemig.domains import DOMAIN_XML

NAMESPACE = "http://libvirt.org/schemas/domain/qemu/1.0"
XMLNS = f" xmlns:qemu='{NAMESPACE}'"
HINT = "<qemu:property name='free-page-hint' type='bool' value='true'/>"
ARRAYS = "<qemu:property name='free-page-hint-arrays' type='bool' value='true'/>"
ALIAS = "\n      <alias name='ua-balloon0'/>"
PROPERTIES = f"\n        {HINT}\n        {ARRAYS}"
FRONTEND = f"\n      <qemu:frontend>{PROPERTIES}\n      </qemu:frontend>"
DEVICE = f"\n    <qemu:device alias='ua-balloon0'>{FRONTEND}\n    </qemu:device>"
OVERRIDE = f"\n  <qemu:override>{DEVICE}\n  </qemu:override>"
ADDRESS = "<address type='pci' domain='0x0000' bus='0x05' slot='0x00' function='0x0'/>"
OTHER = """
    <qemu:device alias='ua-disk'>
      <qemu:frontend>
        <qemu:property name='free-page-hint' type='string' value='of another device'/>
      </qemu:frontend>
    </qemu:device>"""


def domain(balloon: str, override: str = "", space: str = "", kind: str = "kvm") -> str:
    """A domain with a bit of everything that could be mistaken for something else."""
    return f"""<!-- <domain> of <memballoon model='none'/> -->
<domain type='{kind}'{space} >
  <name>a&amp;b&lt;ö</name>
  <memory unit="MiB">64</memory>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <metadata>
    <app:x xmlns:app="urn:app" a = '>"/>'><memballoon model='none'/><![CDATA[</devices>]]></app:x>
  </metadata>
  <devices>
\t<emulator>/usr/bin/qemu-system-x86_64</emulator><!-- ] -->
    {balloon}
    <!-- the end -->
  </devices>{override}
</domain>
"""


def alias(name: str) -> str:
    """A balloon of that name."""
    return f"<memballoon model='virtio'>\n      <alias name='{name}'/>\n    </memballoon>"


@dataclass(frozen=True)
class Case:
    """A domain, and what makes one with arrays of it: what is put in, what is replaced by what."""

    text: str
    new: Sequence[str] = ()
    old: str = ""


PLAIN = f"<memballoon model='virtio'>\n      {ADDRESS}\n    </memballoon>"
NAMED = alias("ua-balloon0")
ADDED = f"\n        {ARRAYS}"
OFF = PROPERTIES.replace("'true'", "'false'").replace("'bool'", "'string'")
NEW = (XMLNS, ALIAS, OVERRIDE)
CASES = {
    "plain": Case(domain(PLAIN), NEW),
    "empty element": Case(
        domain("<memballoon model='virtio'/>"),
        (XMLNS, f"'virtio'>{ALIAS}\n    </memballoon>", OVERRIDE),
        "'virtio'/>",
    ),
    "quotes": Case(
        domain("""<memballoon autodeflate="/>" model='virtio' />"""),
        (XMLNS, f"model='virtio' >{ALIAS}\n    </memballoon>", OVERRIDE),
        "model='virtio' />",
    ),
    "non-transitional": Case(domain(PLAIN.replace("'virtio'", '"virtio-non-transitional"')), NEW),
    "transitional, with reporting": Case(
        domain(PLAIN.replace("'virtio'", "'virtio-transitional' freePageReporting='on'")), NEW
    ),
    "alias of its own": Case(domain(NAMED), (XMLNS, OVERRIDE)),
    "alias that libvirt would forget": Case(
        domain(alias("balloon0")), (XMLNS, OVERRIDE, "'ua-balloon0'"), "'balloon0'"
    ),
    "alias of another device": Case(
        domain(f"<panic model='isa'><alias name='ua-balloon0'/></panic>\n    {PLAIN}"),
        (XMLNS, ALIAS.replace("n0", "n1"), OVERRIDE.replace("n0", "n1")),
    ),
    "namespace there": Case(domain(PLAIN, space=XMLNS), (ALIAS, OVERRIDE)),
    "other prefix": Case(
        domain(PLAIN, space=XMLNS.replace(":qemu", ":q")),
        (ALIAS, OVERRIDE.replace("qemu:", "q:")),
    ),
    "prefix of another namespace": Case(
        domain(PLAIN, space=" xmlns:qemu='urn:other'"),
        (XMLNS.replace(":qemu", ":qemu1"), ALIAS, OVERRIDE.replace("qemu:", "qemu1:")),
    ),
    "override without prefix": Case(
        domain(PLAIN, f"\n  <override xmlns='{NAMESPACE}'>\n  </override>"),
        (ALIAS, DEVICE.replace("qemu:", "")),
    ),
    "override of another device": Case(
        domain(PLAIN, f"\n  <qemu:override>{OTHER}\n  </qemu:override>", XMLNS), (ALIAS, DEVICE)
    ),
    "override of libvirt's own alias": Case(
        domain(PLAIN, OVERRIDE.replace("ua-", "").replace(PROPERTIES, ""), XMLNS), (PROPERTIES,)
    ),
    "hints without arrays": Case(domain(NAMED, OVERRIDE.replace(ADDED, ""), XMLNS), (ADDED,)),
    "switched off": Case(
        domain(NAMED, OVERRIDE.replace(PROPERTIES, OFF), XMLNS), (PROPERTIES,), OFF
    ),
    "on already": Case(domain(NAMED, OVERRIDE, XMLNS)),
    "on a line": Case(
        "<domain type='qemu'><devices><memballoon model='virtio'></memballoon></devices></domain>",
        (XMLNS, "\n  <alias name='ua-balloon0'/>\n", OVERRIDE + "\n"),
    ),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def properties(text: str) -> Optional[Dict[str, Optional[str]]]:
    """What is overridden of the balloon, as another parser reads it."""
    root = ElementTree.fromstring(text)
    names = {a.get("name") for a in root.findall("devices/memballoon/alias")} | {"balloon0"}
    for device in root.findall(f"{{{NAMESPACE}}}override/{{{NAMESPACE}}}device"):
        if device.get("alias") in names:
            found = device.findall(f"{{{NAMESPACE}}}frontend/{{{NAMESPACE}}}property")
            return {str(p.get("name")): p.get("value") for p in found}
    return None


@each_case
def test_enabled_and_nothing_else_is_touched(case: Case) -> None:
    """Both properties are on, once; the rest is the same, byte for byte; twice changes nothing."""
    text = domainxml.enable(case.text, arrays=True)
    assert properties(text) == {"free-page-hint": "true", "free-page-hint-arrays": "true"}
    assert domainxml.read(text).offered == "arrays"
    assert domainxml.enable(text, arrays=True) == text

    before = text
    for new in case.new:
        assert before.count(new) == 1 or new == XMLNS, new
        before = before.replace(new, "\0", 1)
    assert before.replace("\0", "") == case.text.replace(case.old, "", 1)


@each_case
def test_disabled_as_if_it_had_never_been_on(case: Case) -> None:
    """What was switched on is off again; an override that was there before stays, and no other."""
    enabled = domainxml.enable(case.text, arrays=True)
    off = domainxml.disable(enabled)
    assert domainxml.read(off).offered == "no"
    assert not properties(off)
    assert off.count("of another device") == case.text.count("of another device")
    assert ("override" in off) == ("of another device" in off)
    assert domainxml.disable(off) == off
    # What is left of it: the alias and the namespace, which it would be given again.
    assert domainxml.enable(off, arrays=True).split() == enabled.split() or "override" in case.text


@each_case
def test_arrays_alone_are_switched(case: Case) -> None:
    """disable --arrays leaves hints on, and enable without arrays leaves arrays as they are."""
    enabled = domainxml.enable(case.text, arrays=True)
    blocks = domainxml.disable(enabled, arrays_only=True)
    assert properties(blocks) == {"free-page-hint": "true"}
    assert domainxml.enable(blocks, arrays=False) == blocks
    assert domainxml.enable(enabled, arrays=False) == enabled
    assert domainxml.enable(blocks, arrays=True).split() == enabled.split()


ON = "freePageHinting='on' freePageHintArrays='on'"
OVERRIDDEN = ("hints without arrays", "switched off", "on already")


def attributes(text: str) -> Dict[str, str]:
    """The balloon's attributes for hints, as another parser reads them."""
    balloon = ElementTree.fromstring(text).find("devices/memballoon")
    assert balloon is not None
    return {name: value for name, value in balloon.items() if name.startswith("freePageHint")}


@pytest.mark.parametrize("name", CASES)
def test_attributes_and_nothing_else(name: str) -> None:
    """Attributes switch on what no override does; they are all that is new, and go without a trace.

    An override that is there is completed, as where libvirt knows no attributes.
    """
    before = CASES[name].text
    text = domainxml.enable(before, arrays=True, attributes=True)
    if name in OVERRIDDEN:
        assert text == domainxml.enable(before, arrays=True)
        return
    assert attributes(text) == {"freePageHinting": "on", "freePageHintArrays": "on"}
    assert text.count(f" {ON}") == 1 and text.replace(f" {ON}", "") == before
    assert domainxml.read(text).offered == "arrays"
    for known in True, False:
        assert domainxml.enable(text, arrays=True, attributes=known) == text
        assert domainxml.enable(text, arrays=False, attributes=known) == text
    blocks = domainxml.disable(text, arrays_only=True)
    assert attributes(blocks) == {"freePageHinting": "on"}
    assert blocks == domainxml.enable(before, arrays=False, attributes=True)
    assert domainxml.read(blocks).offered == "blocks"
    assert domainxml.enable(blocks, arrays=True, attributes=True) == text
    assert domainxml.disable(text) == domainxml.disable(blocks) == before


def test_attributes_that_are_there() -> None:
    """What is off is switched on where it is; page cache, which needs arrays, goes with them."""
    text = domain(
        """<memballoon freePageHintArrays = "off"
\tmodel='virtio' freePageHinting='off'  freePageHintCache='on' autodeflate='on'/>"""
    )
    assert domainxml.read(text).offered == "no"
    enabled = domainxml.enable(text, arrays=True, attributes=True)
    assert enabled == text.replace('"off"', "'on'").replace("Hinting='off'", "Hinting='on'")
    off = domainxml.disable(enabled)
    assert "<memballoon\n\tmodel='virtio' autodeflate='on'/>" in off
    # Off is not how a stock QEMU can be started.
    assert domainxml.disable(text) == off
    blocks = domainxml.disable(enabled, arrays_only=True)
    assert attributes(blocks) == {"freePageHinting": "on"}


@pytest.mark.parametrize("value", ["true", "false"])
def test_overridden_page_cache(value: str) -> None:
    """It goes with arrays: of no use without them, and a stock QEMU does not start with it."""
    cache = f"<qemu:property name='free-page-hint-cache' type='bool' value='{value}'/>"
    text = domain(NAMED, OVERRIDE.replace(ARRAYS, f"{cache}\n        {ARRAYS}"), XMLNS)
    assert domainxml.read(text).offered == "arrays"
    blocks = domainxml.disable(text, arrays_only=True)
    assert blocks == domain(NAMED, OVERRIDE.replace(f"\n        {ARRAYS}", ""), XMLNS)
    assert domainxml.disable(text) == domain(NAMED, space=XMLNS)
    # Where nothing else was overridden
    left = domainxml.disable(domain(NAMED, OVERRIDE.replace(PROPERTIES, cache), XMLNS))
    assert left == domain(NAMED, space=XMLNS)


@pytest.mark.parametrize("value, offered", [("false", "no"), ("true", "arrays")])
def test_override_has_the_last_word(value: str, offered: str) -> None:
    """QEMU is started with what is overridden, whatever the attributes say; disable ends both."""
    other = {"no": "on", "arrays": "off"}[offered]
    attribute = ON.replace("'on'", f"'{other}'")
    balloon = NAMED.replace("'virtio'", f"'virtio' {attribute}")
    text = domain(balloon, OVERRIDE.replace("'true'", f"'{value}'"), XMLNS)
    assert domainxml.read(text).offered == offered
    enabled = domainxml.enable(text, arrays=True, attributes=True)
    assert enabled == text.replace("'false'", "'true'")
    for names in False, True:
        off = domainxml.disable(enabled, arrays_only=names)
        assert domainxml.read(off).offered == ("blocks" if names else "no")
    assert domainxml.disable(enabled) == domain(NAMED, space=XMLNS)


def test_probe_is_of_the_same_kind() -> None:
    """What libvirt is asked about has the domain's type, machine, QEMU and balloon, and no more."""
    for known in False, True:
        text = domainxml.probe(CASES["non-transitional"].text, attributes=known)
        root = ElementTree.fromstring(text)
        assert root.get("type") == "kvm"
        kind = root.find("os/type")
        assert kind is not None and kind.attrib == {"arch": "x86_64", "machine": "q35"}
        assert root.findtext("devices/emulator") == "/usr/bin/qemu-system-x86_64"
        balloon = root.find("devices/memballoon")
        assert balloon is not None and balloon.get("model") == "virtio-non-transitional"
        assert (ON in text) == known and bool(attributes(text)) == known
        assert "ö" not in text and "metadata" not in text


def test_properties_of_others_stay() -> None:
    """Another property of the balloon, and a comment, keep their place when hints go."""
    comment = "\n        <!-- why -->"
    for kept in comment, f"{comment}\n        <qemu:property name='x' type='string' value='y'/>":
        text = domain(NAMED, OVERRIDE.replace(PROPERTIES, kept + PROPERTIES), XMLNS)
        assert domainxml.disable(text) == text.replace(PROPERTIES, "")


def test_emulator_is_replaced() -> None:
    """Another emulator goes where the old one was, and only if it is another one."""
    plain = domainxml.enable(domain(PLAIN), True)
    text = domainxml.enable(domain(PLAIN), True, "/opt/a&b/qemu")
    assert domainxml.read(text).emulator == "/opt/a&b/qemu"
    assert text.replace("/opt/a&amp;b/qemu", "/usr/bin/qemu-system-x86_64") == plain
    assert domainxml.enable(text, True, "/opt/a&b/qemu") == text
    without = domain(PLAIN).replace("<emulator>/usr/bin/qemu-system-x86_64</emulator>", "")
    assert domainxml.read(domainxml.enable(without, True, "/opt/q")).emulator == "/opt/q"


IMPOSSIBLE = {
    "no balloon": (domain(""), "it has no <memballoon>"),
    "model none": (domain("<memballoon model='none'/>"), "model 'none', hints need 'virtio'"),
    "model xen": (domain("<memballoon model='xen'/>"), "model 'xen', hints need 'virtio'"),
    "no model": (domain("<memballoon/>"), "model 'None', hints need 'virtio'"),
    "no QEMU": (domain(PLAIN, kind="lxc"), "it is of type 'lxc', hints need QEMU"),
    "no devices": ("<domain type='kvm'/>", "it has no <memballoon>"),
    "no domain": ("<network><name>n</name></network>", "not a domain's, but of <network>"),
    "no XML": ("<domain type='kvm'>", "the XML cannot be read: no element found"),
    "nothing": ("", "the XML cannot be read"),
}


@pytest.mark.parametrize("text, why", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_what_cannot_be_enabled_is_refused(text: str, why: str) -> None:
    """Where hints cannot be had, one line says why."""
    for function in domainxml.enable, domainxml.disable:
        with pytest.raises(FphError) as caught:
            function(text, True)
        assert why in str(caught.value) and "\n" not in str(caught.value)


def test_documented_xml_is_what_is_made() -> None:
    """The XML of docs/libvirt.md, which the migration tests run with, is the one that is made."""
    text = DOMAIN_XML.read_text("utf-8")
    assert domainxml.read(text).offered == "arrays"
    off = domainxml.disable(text)
    assert "override" not in off
    assert domainxml.enable(off, arrays=True) == text


def test_libvirt_finds_it_valid(tmp_path: Path) -> None:
    """What is made is valid by libvirt's schema."""
    if not shutil.which("virt-xml-validate"):
        pytest.skip("virt-xml-validate is not installed: run scripts/install-deps libvirt")
    path = tmp_path / "domain.xml"
    command = ["virt-xml-validate", path, "domain"]
    for name in "plain", "other prefix", "override without prefix", "hints without arrays":
        enabled = domainxml.enable(CASES[name].text, arrays=True)
        probe = domainxml.probe(CASES[name].text, attributes=False)
        for text in enabled, domainxml.disable(enabled), probe:
            path.write_text(text.replace("ö", "o").replace("&amp;b&lt;", ""), "utf-8")
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr + text

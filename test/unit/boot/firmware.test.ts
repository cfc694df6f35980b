/** Which firmware starts a disk, and how QEMU is told. */
import { describe, expect, it } from 'vitest';
import { qemuArguments, type BootStart } from '../../../src/boot/boot.js';
import { findOvmf, firmwareOf } from '../../../src/boot/firmware.js';
import type { PartitionTable } from '../../../src/devices/table.js';

const ESP = 'C12A7328-F81F-11D2-BA4B-00A0C93EC93B';
const BIOS_BOOT = '21686148-6449-6E6F-744E-656564454649';
const LINUX = '0FC63DAF-8483-4772-8E79-3D69D8477DE4';

function table(type: 'gpt' | 'mbr', types: readonly string[], hasCode: boolean): PartitionTable {
  const sector0 = new Uint8Array(512);
  if (hasCode) sector0[0] = 0xeb;
  return {
    sector0,
    primaryGpt: undefined,
    facts: {
      type,
      id: '',
      sectorBytes: 512,
      problems: [],
      partitions: types.map((t, i) => ({
        number: i + 1,
        offsetBytes: (i + 1) * 1024 ** 2,
        sizeBytes: 1024 ** 2,
        type: t,
        kind: type === 'gpt' ? 'gpt' : 'primary',
        uuid: '',
      })),
    },
  };
}

describe('the firmware of a disk', () => {
  it.each([
    ['no table', undefined, 'bios'],
    ['MBR', table('mbr', ['0x83'], true), 'bios'],
    ['MBR with an ESP and nothing to run', table('mbr', ['0xef', '0x83'], false), 'uefi'],
    ['MBR with an ESP and a boot program', table('mbr', ['0xef', '0x83'], true), 'bios'],
    ['GPT with an ESP', table('gpt', [ESP, LINUX], false), 'uefi'],
    ['GPT with an ESP, and a program from elsewhere', table('gpt', [ESP, LINUX], true), 'uefi'],
    ['GPT for both', table('gpt', [BIOS_BOOT, ESP, LINUX], true), 'bios'],
    ['GPT with an unused BIOS partition', table('gpt', [BIOS_BOOT, ESP], false), 'uefi'],
    ['GPT for BIOS', table('gpt', [BIOS_BOOT, LINUX], true), 'bios'],
  ] as const)('%s', (_, given, firmware) => {
    expect(firmwareOf(given).firmware).toBe(firmware);
  });

  it('is found where distributions put it, or said to be missing', () => {
    const only = new Set([
      '/usr/share/edk2/ovmf/OVMF_CODE.fd',
      '/usr/share/edk2/ovmf/OVMF_VARS.fd',
    ]);
    expect(findOvmf((path) => only.has(path))).toEqual({
      code: '/usr/share/edk2/ovmf/OVMF_CODE.fd',
      vars: '/usr/share/edk2/ovmf/OVMF_VARS.fd',
    });
    expect(() => findOvmf(() => false)).toThrow(/there is no UEFI for QEMU on this machine/);
  });
});

describe('the command line of QEMU', () => {
  const started: BootStart = {
    accelerator: { accelerator: 'tcg', why: '' },
    firmware: 'bios',
    firmwareWhy: '',
    disk: 'virtio',
    drives: [{ serial: 'b2-0123456789abcdef', logicalBlockBytes: 512 }],
    hostPort: undefined,
  };

  it('has one disk, on the private socket, and no network where none is wanted', () => {
    const args = qemuArguments('/p', undefined, started, { network: false });
    expect(args).toContain('virtio-blk-pci,drive=d0,serial=b2-0123456789abcdef,bootindex=1');
    expect(args.filter((a) => a === '-blockdev')).toHaveLength(2);
    expect(args.join(' ')).toContain('"server":{"type":"unix","path":"/p/s"}');
    expect(args[args.indexOf('-nic') + 1]).toBe('none');
    expect(args.join(' ')).not.toMatch(/pflash|mux=on/);
  });

  it('forwards a port from this machine alone, and has UEFI with variables of its own', () => {
    const args = qemuArguments(
      '/p',
      '/ovmf/code',
      { ...started, hostPort: 4022, disk: 'nvme' },
      { checks: { port: 22 }, attached: true },
    );
    expect(args[args.indexOf('-nic') + 1]).toBe(
      'user,model=virtio-net-pci,hostfwd=tcp:127.0.0.1:4022-:22',
    );
    expect(args).toContain('if=pflash,unit=0,format=raw,readonly=on,file=/ovmf/code');
    expect(args).toContain('if=pflash,unit=1,format=raw,file=/p/vars');
    expect(args).toContain('nvme,drive=d0,serial=b2-0123456789abcdef,bootindex=1');
    expect(args.join(' ')).toMatch(/stdio,id=con,mux=on/);
  });
});

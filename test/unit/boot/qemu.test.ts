/** QEMU's command line, and whether KVM is worth a try. */
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import {
  bootMachine,
  diskSerial,
  qemuArguments,
  type BootStart,
  type DiskBus,
  type Drive,
} from '../../../src/boot/boot.js';
import { acceleratorsToTry, rememberKvmFails } from '../../../src/boot/qemu.js';
import { systemClock } from '../../../src/clock.js';
import { machineFacts } from '../../../src/process-identity.js';
import { MemoryImage } from '../../support/image-memory.js';
import { tempDir, type TempDir } from '../../support/tmp.js';

const started = (more: Partial<BootStart> = {}): BootStart => ({
  accelerator: { accelerator: 'tcg', why: '' },
  firmware: 'bios',
  firmwareWhy: '',
  disk: 'virtio',
  drives: [{ serial: 'b2-0123456789abcdef', logicalBlockBytes: 512 }],
  hostPort: undefined,
  ...more,
});

/** The values of an option, in order. */
function valuesOf(args: readonly string[], option: string): readonly string[] {
  return args.flatMap((arg, i) => (arg === option ? [args[i + 1] ?? ''] : []));
}

describe("QEMU's command line", () => {
  it('reads the disk from our socket alone, and knows nothing else of this machine', () => {
    const args = qemuArguments('/run/d', undefined, started(), {});
    const [nbd, raw] = valuesOf(args, '-blockdev').map((text) => JSON.parse(text) as object);
    expect(nbd).toMatchObject({
      driver: 'nbd',
      server: { type: 'unix', path: '/run/d/s' },
      export: 'd0',
    });
    expect(raw).toMatchObject({ driver: 'raw', 'node-name': 'd0', file: 'n0', discard: 'unmap' });
    expect(args).toContain('-nodefaults');
    expect(args).toContain('-no-user-config');
    expect(valuesOf(args, '-drive')).toEqual([]);
    expect(valuesOf(args, '-accel')).toEqual(['tcg']);
    expect(valuesOf(args, '-smp')).toEqual(['1']);
    expect(valuesOf(args, '-m')).toEqual(['1024']);
    expect(valuesOf(args, '-display')).toEqual(['none']);
    expect(valuesOf(args, '-qmp')).toEqual(['unix:/run/d/q,server=on,wait=off']);
    expect(valuesOf(args, '-nic')).toEqual(['user,model=virtio-net-pci']);
    expect(valuesOf(args, '-chardev')).toEqual(['stdio,id=con,signal=off']);
  });

  it('forwards a port from 127.0.0.1 alone; without a network there is none', () => {
    const withPort = started({ hostPort: 40_022 });
    const options = { checks: { port: 22 } };
    expect(valuesOf(qemuArguments('/d', undefined, withPort, options), '-nic')).toEqual([
      'user,model=virtio-net-pci,hostfwd=tcp:127.0.0.1:40022-:22',
    ]);
    const alone = qemuArguments('/d', undefined, started(), { network: false });
    expect(valuesOf(alone, '-nic')).toEqual(['none']);
  });

  it('of UEFI has the program read-only and variables of its own', () => {
    const args = qemuArguments('/d', '/ovmf/code.fd', started({ firmware: 'uefi' }), {});
    expect(valuesOf(args, '-drive')).toEqual([
      'if=pflash,unit=0,format=raw,readonly=on,file=/ovmf/code.fd',
      'if=pflash,unit=1,format=raw,file=/d/vars',
    ]);
  });

  it('has the console on a terminal with the monitor behind it', () => {
    const args = qemuArguments('/d', undefined, started(), { attached: true });
    expect(valuesOf(args, '-chardev')).toEqual(['stdio,id=con,mux=on,signal=off']);
    expect(valuesOf(args, '-mon')).toEqual(['chardev=con']);
  });

  it('takes memory in whole MiB, processors, display and bus as given', () => {
    const buses: Record<DiskBus, RegExp> = {
      virtio: /^virtio-blk-pci,drive=d0,serial=b2-0123456789abcdef,bootindex=1$/,
      ide: /^ide-hd,drive=d0,bus=ide\.0,unit=0,serial=b2-0123456789abcdef,bootindex=1$/,
      sata: /^ide-hd,drive=d0,bus=ahci0\.0,serial=b2-0123456789abcdef,bootindex=1$/,
      scsi: /^scsi-hd,drive=d0,bus=scsi\.0,scsi-id=0,serial=b2-0123456789abcdef,bootindex=1$/,
      nvme: /^nvme,drive=d0,serial=b2-0123456789abcdef,bootindex=1$/,
    };
    for (const [disk, pattern] of Object.entries(buses) as [DiskBus, RegExp][]) {
      const args = qemuArguments('/d', undefined, started({ disk }), {
        memoryBytes: 256 * 1024 ** 2 + 1,
        cpus: 3,
        display: 'curses',
      });
      expect(valuesOf(args, '-device').at(-1)).toMatch(pattern);
      expect(valuesOf(args, '-m')).toEqual(['257']);
      expect(valuesOf(args, '-smp')).toEqual(['3']);
      expect(valuesOf(args, '-display')).toEqual(['curses']);
    }
  });
});

function drivesOf(...serials: readonly string[]): readonly Drive[] {
  return serials.map((serial) => ({ serial, logicalBlockBytes: 512 }));
}

describe('disks with blocks of 4096 bytes', () => {
  it.each(['virtio', 'scsi', 'nvme'] as const)('are such disks of the guest (%s)', (disk) => {
    const drives = [{ serial: 'a', logicalBlockBytes: 4096 }, ...drivesOf('b')];
    const devices = valuesOf(
      qemuArguments('/d', undefined, started({ disk, drives }), {}),
      '-device',
    );
    const [first, second] = devices.filter((d) => d.includes('drive='));
    expect(first).toContain(
      ',serial=a,logical_block_size=4096,physical_block_size=4096,bootindex=1',
    );
    expect(second).not.toContain('block_size');
  });
});

describe('several disks', () => {
  /** What every bus makes of eight (ide: four) of them. */
  function devices(disk: DiskBus, count = 8): readonly string[] {
    const drives = drivesOf(...Array.from({ length: count }, (_, i) => `s${i}`));
    return valuesOf(qemuArguments('/d', undefined, started({ disk, drives }), {}), '-device');
  }

  it('are exports of one server, in their order, of which the first is started', () => {
    const args = qemuArguments('/d', undefined, started({ drives: drivesOf('a', 'b', 'c') }), {});
    const blocks = valuesOf(args, '-blockdev').map((text) => JSON.parse(text) as object);
    expect(blocks).toMatchObject(
      [0, 1, 2].flatMap((i) => [
        { 'node-name': `n${i}`, server: { path: '/d/s' }, export: `d${i}` },
        { 'node-name': `d${i}`, file: `n${i}` },
      ]),
    );
    expect(valuesOf(args, '-device')).toEqual([
      'virtio-blk-pci,drive=d0,serial=a,bootindex=1',
      'virtio-blk-pci,drive=d1,serial=b',
      'virtio-blk-pci,drive=d2,serial=c',
    ]);
  });

  it('have a place and a serial number of their own on every bus', () => {
    expect(devices('ide', 4).map((d) => d.replace(/,serial.*/, ''))).toEqual([
      'ide-hd,drive=d0,bus=ide.0,unit=0',
      'ide-hd,drive=d1,bus=ide.0,unit=1',
      'ide-hd,drive=d2,bus=ide.1,unit=0',
      'ide-hd,drive=d3,bus=ide.1,unit=1',
    ]);
    expect(devices('sata').filter((d) => /ahci\d$|d0|d5|d6/.test(d))).toEqual([
      'ahci,id=ahci0',
      'ide-hd,drive=d0,bus=ahci0.0,serial=s0,bootindex=1',
      'ide-hd,drive=d5,bus=ahci0.5,serial=s5',
      'ahci,id=ahci1',
      'ide-hd,drive=d6,bus=ahci1.0,serial=s6',
    ]);
    expect(devices('scsi').slice(0, 3)).toEqual([
      'virtio-scsi-pci,id=scsi',
      'scsi-hd,drive=d0,bus=scsi.0,scsi-id=0,serial=s0,bootindex=1',
      'scsi-hd,drive=d1,bus=scsi.0,scsi-id=1,serial=s1',
    ]);
    expect(devices('nvme')[7]).toBe('nvme,drive=d7,serial=s7');
  });

  it('have serial numbers that are the same in every machine, and fit every bus', () => {
    const serial = diskSerial('0123456789abcdef0123456789abcdef');
    expect(serial).toBe('b2-0123456789abcdef');
    expect(serial.length).toBeLessThanOrEqual(20);
  });

  it('with blocks that the bus cannot have are refused before anything is started, and closed', async () => {
    const image = new MemoryImage([{ length: 8192, hole: true }]);
    Object.assign(image, { logicalBlockBytes: 4096 });
    const options = { clock: systemClock, events: () => undefined, cacheDir: '/nowhere' };
    await expect(
      bootMachine([{ name: 'web/sda', serial: 's', image }], { ...options, disk: 'sata' }),
    ).rejects.toMatchObject({
      kind: 'unsupported',
      message: 'web/sda has blocks of 4096 bytes, which no sata disk of QEMU can have',
    });
    expect(image.closed).toBe(1);
  });

  it('that are too many for the bus are refused before anything is started, and closed', async () => {
    const disks = Array.from({ length: 5 }, (_, i) => ({
      name: `v${i}`,
      serial: `s${i}`,
      image: new MemoryImage([{ length: 4096, hole: true }]),
    }));
    const options = { clock: systemClock, events: () => undefined, cacheDir: '/nowhere' };
    await expect(bootMachine(disks, { ...options, disk: 'ide' })).rejects.toMatchObject({
      kind: 'unsupported',
      message: 'a machine takes at most 4 disks (ide), not 5',
    });
    expect(disks.map((d) => d.image.closed)).toEqual([1, 1, 1, 1, 1]);
  });
});

describe('KVM', () => {
  let dir: TempDir;
  beforeEach(() => {
    dir = tempDir();
  });
  afterEach(() => dir.remove());

  it('that has failed is not tried again before the next boot of this machine', async () => {
    const cache = dir.join('cache');
    await rememberKvmFails(cache);
    expect(readFileSync(`${cache}/kvm-fails`, 'utf8').trim()).toBe(machineFacts().bootId);
    expect(await acceleratorsToTry(cache)).toEqual(['tcg']);
    mkdirSync(dir.join('other'));
    writeFileSync(dir.join('other/kvm-fails'), 'another boot\n');
    expect((await acceleratorsToTry(dir.join('other'))).at(-1)).toBe('tcg');
  });

  it('whose failure cannot be remembered is no error', async () => {
    writeFileSync(dir.join('file'), '');
    await rememberKvmFails(dir.join('file/cache'));
    expect((await acceleratorsToTry(dir.join('file/cache'))).at(-1)).toBe('tcg');
  });
});

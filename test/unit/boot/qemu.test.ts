/** QEMU's command line, and whether KVM is worth a try. */
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { qemuArguments, type BootStart, type DiskBus } from '../../../src/boot/boot.js';
import { acceleratorsToTry, rememberKvmFails } from '../../../src/boot/qemu.js';
import { machineFacts } from '../../../src/process-identity.js';
import { tempDir, type TempDir } from '../../support/tmp.js';

const started = (more: Partial<BootStart> = {}): BootStart => ({
  accelerator: { accelerator: 'tcg', why: '' },
  firmware: 'bios',
  firmwareWhy: '',
  disk: 'virtio',
  hostPort: undefined,
  ...more,
});

/** The values of an option, in order. */
function valuesOf(args: readonly string[], option: string): readonly string[] {
  return args.flatMap((arg, i) => (arg === option ? [args[i + 1] ?? ''] : []));
}

describe("QEMU's command line", () => {
  it('reads the disk from our socket alone, and knows nothing else of this machine', () => {
    const args = qemuArguments('/run/d', undefined, started(), { name: 'web/sda' });
    const [nbd, raw] = valuesOf(args, '-blockdev').map((text) => JSON.parse(text) as object);
    expect(nbd).toMatchObject({ driver: 'nbd', server: { type: 'unix', path: '/run/d/s' } });
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
    const options = { name: 'v', checks: { port: 22 } };
    expect(valuesOf(qemuArguments('/d', undefined, withPort, options), '-nic')).toEqual([
      'user,model=virtio-net-pci,hostfwd=tcp:127.0.0.1:40022-:22',
    ]);
    const alone = qemuArguments('/d', undefined, started(), { name: 'v', network: false });
    expect(valuesOf(alone, '-nic')).toEqual(['none']);
  });

  it('of UEFI has the program read-only and variables of its own', () => {
    const args = qemuArguments('/d', '/ovmf/code.fd', started({ firmware: 'uefi' }), { name: 'v' });
    expect(valuesOf(args, '-drive')).toEqual([
      'if=pflash,unit=0,format=raw,readonly=on,file=/ovmf/code.fd',
      'if=pflash,unit=1,format=raw,file=/d/vars',
    ]);
  });

  it('has the console on a terminal with the monitor behind it', () => {
    const args = qemuArguments('/d', undefined, started(), { name: 'v', attached: true });
    expect(valuesOf(args, '-chardev')).toEqual(['stdio,id=con,mux=on,signal=off']);
    expect(valuesOf(args, '-mon')).toEqual(['chardev=con']);
  });

  it('takes memory in whole MiB, processors, display and bus as given', () => {
    const buses: Record<DiskBus, RegExp> = {
      virtio: /^virtio-blk-pci,drive=d0/,
      ide: /^ide-hd,drive=d0,bus=ide\.0/,
      sata: /^ide-hd,drive=d0,bus=ahci\.0/,
      scsi: /^scsi-hd,drive=d0,bus=scsi\.0/,
      nvme: /^nvme,drive=d0,serial=/,
    };
    for (const [disk, pattern] of Object.entries(buses) as [DiskBus, RegExp][]) {
      const args = qemuArguments('/d', undefined, started({ disk }), {
        name: 'v',
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

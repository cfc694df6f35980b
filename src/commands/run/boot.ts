import { B2Error, ExitCode, messageOf } from '../../errors.js';
import {
  bootMachine,
  type BootChecks,
  type BootResult,
  type CheckName,
  type DiskBus,
  type DiskBytes,
} from '../../boot/boot.js';
import { formatBytes, formatTimeLocal, printable } from '../../human.js';
import { allowReadAhead } from '../../repo/point.js';
import { choosePointSet, type PointSet } from '../../repo/point-set.js';
import { findVolume } from '../../repo/volume.js';
import type { Style } from '../../ui/style.js';
import { parseWhen } from '../../when.js';
import type { BootInput } from '../boot.js';
import type { CommandContext, Outcome } from '../spec.js';
import {
  firstPoint,
  machineRow,
  openDisks,
  otherDiskLines,
  tellTo,
  withBytes,
  type BootDiskRow,
  type MachineRow,
} from './boot-disks.js';
import type { PointRow } from './rows.js';
import { volumesOf, withRepository } from './session.js';

/** `volume` and `point` are those of the first disk. */
export interface BootAnswer extends MachineRow {
  readonly volume: string;
  readonly volumeId: string;
  readonly point: PointRow;
  readonly ok: boolean;
  readonly why?: string;
  readonly accelerator: 'kvm' | 'tcg';
  readonly acceleratorWhy: string;
  readonly firmware: 'bios' | 'uefi';
  readonly disk: DiskBus;
  readonly passed: readonly { readonly check: CheckName; readonly seconds: number }[];
  readonly seconds: number;
  readonly hostPort?: number;
  readonly screenshot?: string;
  /** Of all disks together; each one's are in `disks`. */
  readonly readBytes: number;
  readonly writtenBytes: number;
  readonly disks: readonly (BootDiskRow & Partial<DiskBytes>)[];
  /** The end of what its serial port said. */
  readonly console: string;
}

/** For a machine that is checked. */
export const DEFAULT_BOOT_MS = 300_000;
const CONSOLE_LINES = 8;

export function run(context: CommandContext, input: BootInput): Promise<Outcome<BootAnswer>> {
  const { options } = input;
  const checks = checksOf(options);
  const isChecked = options.check !== undefined || options.command !== undefined;
  // A port alone is forwarded for whoever sits at the console.
  const isAttached =
    context.output.interactive && process.stdin.isTTY && !options.headless && !isChecked;
  const hasChecks = isChecked || (options.port !== undefined && !isAttached);
  if (!isAttached && !hasChecks && options.timeout === undefined && options.headless === false)
    throw new B2Error('usage', 'there is no terminal for the console of the machine', {
      hint: 'Give a --check, --port or --command to wait for, a --timeout, or --headless to run until it is stopped.',
    });
  if (options.port !== undefined && options['no-network'])
    throw new B2Error('usage', '--port needs a network, and --no-network takes it away');
  return withRepository(context, async (repo) => {
    const tell = tellTo(context.events);
    allowReadAhead(repo, repo.store.url, (error) =>
      tell.warn(`reading ahead has ended: ${messageOf(error)}`),
    );
    const volumes = await volumesOf(context, repo);
    const volume = findVolume(volumes, input.arguments.volume);
    const beside = options.with.map((text) => findVolume(volumes, text));
    const when = parseWhen(options.at, context.clock.nowNs());
    const { alone } = options;
    const set = await choosePointSet(repo, volumes, volume, when, { alone, beside, ...tell });
    try {
      const { commit } = set.first;
      const result = await bootMachine(await openDisks(repo, set, options.overlay), {
        clock: context.clock,
        events: context.events,
        cacheDir: context.settings.cacheDir,
        checks: hasChecks ? checks : { port: options.port },
        watch: hasChecks,
        timeoutMs: options.timeout ?? (hasChecks ? DEFAULT_BOOT_MS : undefined),
        attached: isAttached,
        onStart: (started) => {
          const { accelerator, firmware, hostPort } = started;
          const record = {
            type: 'booting',
            volume: volume.name,
            point: firstPoint(set),
            ...machineRow(set),
            accelerator: accelerator.accelerator,
            firmware,
            ...(hostPort === undefined ? {} : { hostPort }),
          };
          const port =
            hostPort === undefined ? '' : `, port ${options.port} at 127.0.0.1:${hostPort}`;
          const keys = isAttached ? ' (Ctrl-A x ends it)' : '';
          const lines = [
            `booting ${volume.name} at ${formatTimeLocal(commit.instantNs)} (#${commit.seq}): ${accelerator.accelerator.toUpperCase()} (${accelerator.why}), ${firmware.toUpperCase()}${port}${keys}`,
            ...otherDiskLines(set),
          ];
          context.output.line(record, lines.join('\n'));
        },
        memoryBytes: options.memory,
        cpus: options.cpus,
        disk: options.disk,
        firmware: options.firmware === 'auto' ? undefined : options.firmware,
        display: options.display,
        network: !options['no-network'],
        screenshot: options.screenshot,
        powerDown: options.overlay !== undefined,
        signal: context.signal,
      });
      return {
        data: {
          volume: volume.name,
          volumeId: volume.id,
          point: firstPoint(set),
          ...bootFields(result, set),
        },
        code: result.ok ? ExitCode.ok : ExitCode.failed,
      };
    } finally {
      await set.close();
    }
  });
}

/** The result as the fields of an answer. */
export function bootFields(
  result: BootResult,
  set: PointSet,
): Omit<BootAnswer, 'volume' | 'volumeId' | 'point'> {
  const { accelerator, why, hostPort, screenshot, diskBytes, ...more } = result;
  const { firmwareWhy: _why, drives: _drives, ...rest } = more;
  return {
    ...rest,
    ...withBytes(machineRow(set), diskBytes),
    accelerator: accelerator.accelerator,
    acceleratorWhy: accelerator.why,
    ...(why === undefined ? {} : { why }),
    ...(hostPort === undefined ? {} : { hostPort }),
    ...(screenshot === undefined ? {} : { screenshot }),
  };
}

function checksOf(options: BootInput['options']): BootChecks {
  return { console: options.check, port: options.port, command: options.command };
}

/** The last lines of a console, safe to print. */
export function consoleTail(console: string): readonly string[] {
  return console
    .replace(/\x1b\[[0-9;?]*[A-Za-z]/g, '')
    .split(/[\r\n]+/)
    .map((line) => printable(line).trimEnd())
    .filter((line) => line !== '')
    .slice(-CONSOLE_LINES);
}

const CHECK_TEXT: Readonly<Record<CheckName, string>> = {
  console: 'its console said so',
  port: 'its port answers',
  command: 'the command succeeded',
};

export function text(a: BootAnswer, style: Style): string {
  const lines = a.passed.map(
    (p) => `${style.green('passed')}  ${CHECK_TEXT[p.check]} after ${p.seconds.toFixed(1)} s`,
  );
  if (a.why !== undefined) {
    lines.push(`${style.red('failed')}  ${a.why}`);
    for (const line of consoleTail(a.console)) lines.push(`        ${style.dim(line)}`);
  }
  if (a.screenshot !== undefined) lines.push(`screen: ${a.screenshot}`);
  lines.push(
    `${a.seconds.toFixed(1)} s; ${formatBytes(a.readBytes)} read, ${formatBytes(a.writtenBytes)} written`,
  );
  return lines.join('\n');
}

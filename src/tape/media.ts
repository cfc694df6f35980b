/** Getting the next cartridge into the drive: by a person at the terminal, by a command, or by a changer. */
import { spawn } from 'node:child_process';
import { openSync, writeSync } from 'node:fs';
import { isatty, ReadStream } from 'node:tty';

import { runTool, lastWords } from '../devices/run.js';
import type { TapeDrive } from '../devices/tape/drive.js';
import { B2Error, messageOf } from '../errors.js';

/** What is wanted in the drive. */
export interface CartridgeWish {
  readonly drive: string;
  readonly setName: string;
  /** Number in the set, if it is known. */
  readonly number: number | undefined;
  /** The very cartridge, if it is known. */
  readonly label: string | undefined;
  readonly barcode: string | undefined;
  /** `write`: a new one, or one that may be overwritten. */
  readonly purpose: 'write' | 'read';
}

/** Where cartridges come from. */
export interface CartridgeSource {
  /**
   * Puts another cartridge in. False: there is none. It may be another than the one wished for: who asks looks at its label. Before the
   * call the drive was told to eject, afterwards it is loaded anew.
   */
  next(wish: CartridgeWish): Promise<boolean>;
  /** Bar code of what is in the drive, if it is known. */
  barcode?(): Promise<string | undefined>;
}

function describe(wish: CartridgeWish): string {
  if (wish.label !== undefined) return `cartridge ${wish.label}`;
  const number = wish.number === undefined ? 'another cartridge' : `cartridge ${wish.number}`;
  return `${number} of the set "${wish.setName}"${wish.purpose === 'write' ? ' (a new one)' : ''}`;
}

/** Asks on the controlling terminal. Undefined if there is none. */
export function terminalSource(): CartridgeSource | undefined {
  let fd: number;
  try {
    fd = openSync('/dev/tty', 'r+');
  } catch {
    return undefined;
  }
  if (!isatty(fd)) return undefined;
  return {
    next: (wish) =>
      new Promise((resolve, reject) => {
        writeSync(
          fd,
          `\nPut ${describe(wish)} into ${wish.drive} and press Enter (q: there is none) `,
        );
        const tty = new ReadStream(openSync('/dev/tty', 'r'));
        tty.once('error', (error) => {
          reject(new B2Error('failed', `cannot read from the terminal: ${messageOf(error)}`));
        });
        tty.once('data', (data: Buffer) => {
          tty.destroy();
          resolve(!data.toString('utf8').trim().toLowerCase().startsWith('q'));
        });
      }),
  };
}

/** Runs a command of the user's, by the shell, and waits for it. Its status 0 says that the cartridge is in. */
export function commandSource(
  command: string,
  env: Readonly<Record<string, string | undefined>>,
  signal: AbortSignal | undefined,
): CartridgeSource {
  return {
    next: (wish) =>
      new Promise((resolve, reject) => {
        const child = spawn('/bin/sh', ['-c', command], {
          stdio: ['ignore', 'ignore', 'inherit'],
          env: {
            ...withoutSecrets(env),
            B2_TAPE_DRIVE: wish.drive,
            B2_TAPE_SET: wish.setName,
            B2_TAPE_NUMBER: wish.number === undefined ? '' : String(wish.number),
            B2_TAPE_LABEL: wish.label ?? '',
            B2_TAPE_PURPOSE: wish.purpose,
          },
          ...(signal === undefined ? {} : { signal }),
        });
        child.once('error', (error) => {
          reject(
            signal?.aborted === true
              ? new B2Error('interrupted', 'waiting for a cartridge was interrupted')
              : new B2Error('failed', `the command for the next cartridge: ${messageOf(error)}`),
          );
        });
        child.once('exit', (code) => {
          resolve(code === 0);
        });
      }),
  };
}

function withoutSecrets(
  env: Readonly<Record<string, string | undefined>>,
): Record<string, string | undefined> {
  return Object.fromEntries(
    Object.entries(env).filter(([key]) => !/^(B2_(PASSWORD|KEY)|AWS_)/.test(key)),
  );
}

/** A slot of a changer. */
export interface ChangerSlot {
  readonly slot: number;
  readonly full: boolean;
  readonly barcode: string | undefined;
}

export interface ChangerStatus {
  /** What is in the drive, and the slot it came from. */
  readonly drive: {
    readonly full: boolean;
    readonly slot: number | undefined;
    readonly barcode: string | undefined;
  };
  readonly slots: readonly ChangerSlot[];
}

/** Reads what `mtx status` prints, for drive `drive`. */
export function parseChangerStatus(text: string, drive = 0): ChangerStatus {
  const slots: ChangerSlot[] = [];
  let inDrive: ChangerStatus['drive'] = { full: false, slot: undefined, barcode: undefined };
  for (const line of text.split('\n')) {
    const tag = /VolumeTag\s*=\s*(\S+)/.exec(line)?.[1];
    const d =
      /^Data Transfer Element (\d+):(Full|Empty)(?: \(Storage Element (\d+) Loaded\))?/.exec(
        line.trim(),
      );
    if (d !== null && Number(d[1]) === drive)
      inDrive = {
        full: d[2] === 'Full',
        slot: d[3] === undefined ? undefined : Number(d[3]),
        barcode: tag,
      };
    const s = /^Storage Element (\d+)( IMPORT\/EXPORT)?:(Full|Empty)/.exec(line.trim());
    if (s !== null && s[2] === undefined)
      slots.push({ slot: Number(s[1]), full: s[3] === 'Full', barcode: tag });
  }
  return { drive: inDrive, slots };
}

/** A changer, driven by mtx: `device` is its generic SCSI node. Takes the wished bar code, else the next full slots in turn. */
export function changerSource(device: string, drive = 0): CartridgeSource {
  const tried = new Set<number>();
  const mtx = async (...args: readonly string[]): Promise<string> => {
    const done = await runTool('mtx', ['-f', device, ...args], 600_000);
    if (done === undefined)
      throw new B2Error('unsupported', 'mtx is not installed, which drives the changer', {
        hint: 'Install the package "mtx".',
      });
    if (done.status !== 0)
      throw new B2Error('io', `mtx -f ${device} ${args.join(' ')}: ${lastWords(done)}`, {
        hint: 'Look at the changer: "mtx -f DEVICE status".',
      });
    return done.stdout;
  };
  return {
    async next(wish) {
      const status = parseChangerStatus(await mtx('status'), drive);
      if (status.drive.slot !== undefined) tried.add(status.drive.slot);
      const full = status.slots.filter((s) => s.full);
      const wished = wish.barcode ?? wish.label;
      const chosen =
        full.find((s) => wished !== undefined && s.barcode === wished) ??
        full.find((s) => !tried.has(s.slot));
      if (chosen === undefined) return false;
      if (status.drive.full) {
        const home = status.drive.slot ?? status.slots.find((s) => !s.full)?.slot;
        if (home === undefined) return false;
        await mtx('unload', String(home), String(drive));
      }
      tried.add(chosen.slot);
      await mtx('load', String(chosen.slot), String(drive));
      return true;
    },
    async barcode() {
      return parseChangerStatus(await mtx('status'), drive).drive.barcode;
    },
  };
}

/** Changes the cartridge: ejects, asks `source`, loads. False if there is none. */
export async function changeCartridge(
  drive: TapeDrive,
  source: CartridgeSource,
  wish: CartridgeWish,
): Promise<boolean> {
  if ((await drive.status()).loaded) await drive.eject();
  if (!(await source.next(wish))) return false;
  await drive.load();
  return true;
}

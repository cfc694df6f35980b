/**
 * Where a password or key comes from: environment, file, command, systemd credential, or a person at a terminal. Nothing here ever
 * puts a secret into a message.
 */
import { execFile } from 'node:child_process';
import { closeSync, openSync, readFileSync, statSync, writeSync } from 'node:fs';
import { join } from 'node:path';
import { ReadStream, isatty } from 'node:tty';
import { B2Error, errnoOf, ioError, messageOf } from './errors.js';

/** A secret as it was found; `source` may be shown. */
export type FoundSecret =
  | { readonly kind: 'password'; readonly password: string; readonly source: string }
  | {
      readonly kind: 'keyFileText';
      readonly text: string;
      readonly path: string;
      readonly source: string;
    };

export interface SecretPlaces {
  readonly passwordFile?: string;
  readonly passwordCommand?: string;
  readonly keyFile?: string;
  /** The value of B2_PASSWORD, where the environment is asked at all. */
  readonly password?: string;
  /** `$CREDENTIALS_DIRECTORY` of systemd. */
  readonly credentialsDirectory?: string;
  /** A key file that is used if it exists and nothing else was named. */
  readonly defaultKeyFile?: string;
}

/** The first line of a password file, without its end. Kind `wrong-key` with the path if it cannot be read or is empty. */
export function readPasswordFile(path: string, source: string): FoundSecret {
  let text: string;
  try {
    text = readFileSync(path, 'utf8');
  } catch (error) {
    throw unreadable('password file', path, error);
  }
  const password = text.replace(/\r?\n$/, '');
  if (password === '') throw new B2Error('wrong-key', `the password file ${path} is empty`);
  return { kind: 'password', password, source };
}

function unreadable(what: string, path: string, error: unknown): B2Error {
  const cause = ioError(`cannot read the ${what}`, path, error);
  return new B2Error('wrong-key', cause.message, {
    cause: error,
    ...(cause.hint === undefined ? {} : { hint: cause.hint }),
  });
}

/** The text of a key file; refuses one that others may read. */
export function readKeyFile(path: string, source: string): FoundSecret {
  try {
    const { mode } = statSync(path);
    if ((mode & 0o077) !== 0) {
      throw new B2Error(
        'wrong-key',
        `the key file ${path} can be read by others (mode ${(mode & 0o777).toString(8)})`,
        {
          hint: `Make it private: chmod 600 ${path}`,
        },
      );
    }
    return { kind: 'keyFileText', text: readFileSync(path, 'utf8'), path, source };
  } catch (error) {
    if (error instanceof B2Error) throw error;
    throw unreadable('key file', path, error);
  }
}

function runCommand(command: string): Promise<string> {
  return new Promise((resolve, reject) => {
    execFile(
      '/bin/sh',
      ['-c', command],
      { timeout: 60_000, maxBuffer: 64 * 1024 },
      (error, stdout) => {
        if (error === null) return resolve(stdout);
        // The text of the error holds the command line and its output; neither goes into a message.
        const why =
          typeof error.code === 'number'
            ? `it ended with code ${error.code}`
            : 'it did not end within 60 s or could not be started';
        reject(
          new B2Error('wrong-key', `the password command failed: ${why}`, {
            hint: 'Run the command of B2_PASSWORD_COMMAND by hand.',
          }),
        );
      },
    );
  });
}

/** Every secret that `places` name. Empty if they name none. */
export async function findSecrets(places: SecretPlaces): Promise<FoundSecret[]> {
  const found: FoundSecret[] = [];
  if (places.password !== undefined && places.password !== '') {
    found.push({ kind: 'password', password: places.password, source: 'B2_PASSWORD' });
  }
  if (places.passwordFile !== undefined)
    found.push(readPasswordFile(places.passwordFile, places.passwordFile));
  if (places.passwordCommand !== undefined) {
    const password = (await runCommand(places.passwordCommand)).replace(/\r?\n$/, '');
    if (password === '') throw new B2Error('wrong-key', 'the password command printed nothing');
    found.push({ kind: 'password', password, source: 'the password command' });
  }
  if (places.keyFile !== undefined) found.push(readKeyFile(places.keyFile, places.keyFile));
  if (found.length === 0 && places.credentialsDirectory !== undefined) {
    const path = join(places.credentialsDirectory, 'b2-password');
    try {
      found.push(readPasswordFile(path, 'the systemd credential b2-password'));
    } catch (error) {
      if (errnoOf((error as B2Error).cause) !== 'ENOENT') throw error;
    }
  }
  if (found.length === 0 && places.defaultKeyFile !== undefined) {
    try {
      found.push(readKeyFile(places.defaultKeyFile, places.defaultKeyFile));
    } catch (error) {
      if (errnoOf((error as B2Error).cause) !== 'ENOENT') throw error;
    }
  }
  return found;
}

/**
 * Asks for a password on the controlling terminal, without showing it. Undefined if there is no terminal. Kind `interrupted` on
 * Ctrl-C.
 */
export async function askPassword(prompt: string): Promise<string | undefined> {
  let fd: number;
  try {
    fd = openSync('/dev/tty', 'r+');
  } catch {
    return undefined; // no controlling terminal: a service, a pipe, cron
  }
  if (!isatty(fd)) {
    closeSync(fd);
    return undefined;
  }
  writeSync(fd, prompt);
  const tty = new ReadStream(fd);
  tty.setRawMode(true);
  try {
    return await new Promise<string>((resolve, reject) => {
      let text = '';
      tty.on('error', (error) => {
        reject(new B2Error('failed', `cannot read from the terminal: ${messageOf(error)}`));
      });
      tty.on('data', (data: Buffer) => {
        for (const c of data.toString('utf8')) {
          if (c === '\r' || c === '\n' || c === '\u0004') return resolve(text);
          if (c === '\u0003') return reject(new B2Error('interrupted', 'interrupted'));
          text = c === '\u007f' || c === '\b' ? [...text].slice(0, -1).join('') : text + c;
        }
      });
    });
  } finally {
    tty.setRawMode(false);
    writeSync(fd, '\n');
    tty.destroy();
  }
}

import { B2Error } from '../../errors.js';
import type { Secret } from '../../repo/keys.js';
import { askPassword, readKeyFile, readPasswordFile } from '../../secrets.js';
import type { Style } from '../../ui/style.js';
import type { KeyAddInput } from '../key-add.js';
import type { CommandContext, Outcome } from '../spec.js';
import { makeKeyFile } from './init.js';
import { secretOf, withRepository } from './session.js';

export interface KeyAddResult {
  readonly id: string;
  readonly kind: string;
  readonly label: string;
  /** A key file that was made. */
  readonly keyFile?: string;
}

async function newPassword(): Promise<Secret> {
  const password = await askPassword('New password: ');
  if (password === undefined) {
    throw new B2Error('usage', 'there is no terminal to ask for the new password at', {
      hint: 'Use --new-password-file or --new-key-file.',
    });
  }
  if (password === '') throw new B2Error('usage', 'the password is empty');
  if ((await askPassword('The same again: ')) !== password) {
    throw new B2Error('usage', 'the two passwords differ; nothing was changed');
  }
  return { kind: 'password', password, source: 'the terminal' };
}

export function run(context: CommandContext, input: KeyAddInput): Promise<Outcome<KeyAddResult>> {
  const passwordFile = input.options['new-password-file'];
  const keyFile = input.options['new-key-file'];
  if (passwordFile !== undefined && keyFile !== undefined) {
    throw new B2Error('usage', '--new-password-file and --new-key-file exclude each other');
  }
  return withRepository(context, async (repo) => {
    let made: string | undefined;
    let secret: Secret;
    if (keyFile !== undefined) {
      made = await makeKeyFile(context, keyFile);
      secret = secretOf(readKeyFile(keyFile, keyFile));
    } else if (passwordFile !== undefined) {
      secret = secretOf(readPasswordFile(passwordFile, passwordFile));
    } else {
      secret = await newPassword();
    }
    const label = input.options.label ?? (secret.kind === 'password' ? 'password' : 'key file');
    const key = await repo.addKey(secret, label);
    return {
      data: {
        id: key.id,
        kind: key.kind === 'scrypt' ? 'password' : 'key file',
        label: key.label,
        ...(made === undefined ? {} : { keyFile: made }),
      },
    };
  });
}

export function text(data: KeyAddResult, style: Style): string {
  const made =
    data.keyFile === undefined ? '' : ` (made ${data.keyFile}: keep a copy of it elsewhere)`;
  return `${style.green('added')} key ${data.id}, a ${data.kind}${made}`;
}

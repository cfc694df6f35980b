import { existsSync } from 'node:fs';
import { dirname } from 'node:path';
import { B2Error } from '../../errors.js';
import { CHUNK_SIZES, MAX_CONFIG_PACK_BYTES, MIN_PACK_BYTES } from '../../format/config.js';
import { mkdirDurable, writeFileDurable } from '../../fs.js';
import { formatBytes } from '../../human.js';
import { keyFileText, type Secret } from '../../repo/keys.js';
import { Repository } from '../../repo/repository.js';
import { openStore } from '../../repo/store-url.js';
import { askPassword, findSecrets } from '../../secrets.js';
import type { Style } from '../../ui/style.js';
import type { InitInput } from '../init.js';
import type { CommandContext, Outcome } from '../spec.js';
import { refuseOccupied } from './occupied.js';
import { environmentOf, secretOf, secretPlaces } from './session.js';

export interface InitResult {
  readonly url: string;
  readonly id: string;
  readonly encryption: string;
  readonly chunkBytes: number;
  readonly packBytes: number;
  readonly keyId: string;
  /** A key file that was made. */
  readonly keyFile?: string;
}

/** Makes the key file that the settings name, if it is not there. Returns its path if it did. */
export async function makeKeyFile(
  context: CommandContext,
  path: string,
): Promise<string | undefined> {
  if (existsSync(path)) return undefined;
  await mkdirDurable(dirname(path));
  await writeFileDurable(path, Buffer.from(keyFileText(context.random(32)), 'ascii'), {
    mode: 0o600,
    ifAbsent: true,
  });
  return path;
}

async function firstSecret(context: CommandContext): Promise<Secret> {
  const found = await findSecrets(secretPlaces(context));
  const [first] = found;
  if (first !== undefined) return secretOf(first);
  const password = await askPassword('New password of the repository: ');
  if (password === undefined) {
    throw new B2Error(
      'wrong-key',
      'an encrypted repository needs a password or a key file, and there is no terminal to ask at',
      {
        hint: 'Set B2_PASSWORD_FILE, or B2_KEY_FILE (made if it does not exist), or use --encryption none.',
      },
    );
  }
  if (password === '') throw new B2Error('usage', 'the password is empty');
  if ((await askPassword('The same again: ')) !== password) {
    throw new B2Error('usage', 'the two passwords differ; nothing was made');
  }
  return { kind: 'password', password, source: 'the terminal' };
}

export async function run(context: CommandContext, input: InitInput): Promise<Outcome<InitResult>> {
  const { options } = input;
  const chunkBytes = options['chunk-size'];
  const packBytes = options['pack-size'];
  if (!CHUNK_SIZES.includes(chunkBytes)) {
    throw new B2Error(
      'usage',
      `--chunk-size ${chunkBytes} is not one of 16K, 32K, 64K, 128K, 256K`,
    );
  }
  if (packBytes < MIN_PACK_BYTES || packBytes > MAX_CONFIG_PACK_BYTES) {
    throw new B2Error('usage', `--pack-size ${packBytes} is not within 1M to 256M`);
  }
  const encryption = options.encryption === 'none' ? 'none' : 'aes256-gcm';
  const { keyFile } = context.settings.credentials;
  let made: string | undefined;
  let secret: Secret | undefined;
  const store = await openStore(context.settings.repository.url, { create: true });
  try {
    await refuseOccupied(store);
    if (encryption !== 'none') {
      if (keyFile !== undefined) made = await makeKeyFile(context, keyFile);
      secret = await firstSecret(context);
    }
    const repo = await Repository.init(
      store,
      { encryption, chunkBytes, packBytes },
      secret,
      environmentOf(context),
    );
    return {
      data: {
        url: store.url,
        id: repo.id,
        encryption,
        chunkBytes,
        packBytes,
        keyId: repo.keyId,
        ...(made === undefined ? {} : { keyFile: made }),
      },
    };
  } finally {
    await store.close();
  }
}

export function text(data: InitResult, style: Style): string {
  const lines = [
    `${style.green('made')} repository ${data.id.slice(0, 8)} at ${data.url} (${data.encryption === 'none' ? 'not encrypted' : 'AES-256-GCM'}, chunks of ${formatBytes(data.chunkBytes)})`,
  ];
  if (data.keyFile !== undefined) {
    lines.push(`its key is in ${data.keyFile}`);
    lines.push(
      style.yellow(
        `Copy ${data.keyFile} to another machine now: without it the backup cannot be read.`,
      ),
    );
  } else if (data.encryption !== 'none') {
    lines.push(
      style.yellow(
        'Keep its password or key file on another machine too: without it the backup cannot be read.',
      ),
    );
  }
  return lines.join('\n');
}
